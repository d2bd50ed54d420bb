// The C interface of libseqpar_attn: block kernels of attention on one GPU, by raw pointers.
//
// Nothing here knows of torch, so one binary serves every torch and every Python. A caller fills a struct, zeroes what
// it does not use, and passes a stream; nothing synchronises. All strides count elements, and the head dimension is
// contiguous. Pointers and strides (in bytes) must be multiples of 16, those of lse and delta of 4.
#ifndef SEQPAR_ATTN_H
#define SEQPAR_ATTN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes whenever a struct, an enumeration or the meaning of an argument does.
#define SEQPAR_ATTN_ABI 3

#if defined(_WIN32)
#define SEQPAR_ATTN_EXPORT __declspec(dllexport)
#else
#define SEQPAR_ATTN_EXPORT __attribute__((visibility("default")))
#endif

enum SeqparDtype { SEQPAR_BF16 = 0, SEQPAR_FP16 = 1 };

// FULL: everything is seen. CAUSAL: query i sees the keys j <= i + offset. INTERVAL: key_lo[i] <= j < key_hi[i].
enum SeqparMask { SEQPAR_FULL = 0, SEQPAR_CAUSAL = 1, SEQPAR_INTERVAL = 2 };

// [batch, seqlen, nheads, headdim]; keys may have parts in front: [parts, batch, seqlen, nheads_kv, headdim].
typedef struct {
  int64_t part, batch, seq, head;
} SeqparStrides;

typedef struct {
  int64_t batch, head;  // lse, delta: [batch, nheads, seqlen_q], contiguous along the sequence
} SeqparRowStrides;

typedef struct {
  int32_t batch, seqlen_q, seqlen_k, parts, nheads, nheads_kv, headdim;
  int32_t dtype;
  int32_t mask;
  int32_t offset;           // CAUSAL
  const int32_t* key_lo;    // INTERVAL: [seqlen_q], non-decreasing
  const int32_t* key_hi;    // [seqlen_q]
  const int32_t* query_lo;  // [seqlen_k], the same set seen from the keys
  const int32_t* query_hi;  // [seqlen_k]
  float softmax_scale;      // > 0
  float softcap;            // 0: none
  int32_t sm_margin;        // forward: streaming multiprocessors left to others
  int32_t variant;          // 0: the library chooses; for measurements
} SeqparProblem;

// Continues the softmax of q over one more block of keys.
typedef struct {
  SeqparProblem problem;
  const void* q;
  const void* k;
  const void* v;
  float* lse;      // natural logarithm; -inf for rows that have seen no key
  float* out_acc;  // fp32, the normalised result so far; read if carry, written if keep
  void* out;       // the inputs' dtype; written if not null
  int32_t carry, keep;
  SeqparStrides q_strides, k_strides, v_strides, acc_strides, out_strides;
  SeqparRowStrides lse_strides;
  // Ints that no other launch in flight uses, as many as seqpar_attn_forward_counters says: zeroed before the first
  // launch, and left for the next launch of any forward.
  int32_t* counter;
} SeqparForward;

// Gradients of one block, given the global lse and delta.
typedef struct {
  SeqparProblem problem;
  const void* q;
  const void* k;
  const void* v;
  const void* dout;
  const float* lse;
  const float* delta;  // rowsum(dout * out)
  float* dq;           // fp32, added to if carry_dq, else overwritten; in a form of its own, see SeqparFinishDq
  void* dk;            // fp32, added to if carry_dkv, else overwritten
  void* dv;
  int32_t carry_dq, carry_dkv;
  int32_t round_dkv;      // dk and dv are of the inputs' dtype; not if carry_dkv
  int32_t deterministic;  // dq is summed in a fixed order
  SeqparStrides q_strides, k_strides, v_strides, dout_strides, dq_strides, dk_strides, dv_strides;
  SeqparRowStrides lse_strides, delta_strides;
  // Ints that no other launch in flight uses, as many as seqpar_attn_backward_counters says: zeroed before the first
  // launch, and left for the next launch of any backward that is deterministic alike. Null if that is 0.
  int32_t* counter;
} SeqparBackward;

// delta = rowsum(dout * out).
typedef struct {
  int32_t batch, seqlen, nheads, headdim, dtype;
  const void* out;
  const void* dout;
  float* delta;
  SeqparStrides out_strides, dout_strides;
  SeqparRowStrides delta_strides;
} SeqparDelta;

// The gradient of q, in the inputs' dtype, from what backward has accumulated in dq. That is not the gradient itself:
// factors are left out, and of every 8 columns the even ones lie before the odd ones.
typedef struct {
  int32_t batch, seqlen, nheads, headdim, dtype;
  float softmax_scale;
  const float* dq;
  void* grad;
  SeqparStrides dq_strides, grad_strides;
} SeqparFinishDq;

// A partial result merged into (out_acc, lse); the merged rows also go to out if it is not null.
typedef struct {
  int32_t batch, seqlen, nheads, headdim, dtype;
  int32_t part_fp32;  // out_part is fp32, else of the dtype
  float* lse;
  float* out_acc;
  const float* lse_part;
  const void* out_part;
  void* out;
  SeqparStrides acc_strides, part_strides, out_strides;
  SeqparRowStrides lse_strides, lse_part_strides;
} SeqparMerge;

// target += the sum over parts; fp32, contiguous from the sequence on.
typedef struct {
  int32_t batch, count;
  int64_t elements;  // per batch index
  float* target;
  const float* parts;
  int64_t target_batch_stride, part_stride, part_batch_stride;
} SeqparAccumulate;

SEQPAR_ATTN_EXPORT int32_t seqpar_attn_abi(void);
// Sizes of SeqparForward, SeqparBackward, SeqparDelta, SeqparFinishDq, SeqparMerge, SeqparAccumulate, so that a
// caller's structs can be compared.
SEQPAR_ATTN_EXPORT size_t seqpar_attn_struct_size(int32_t which);
// The architectures the library was built for, such as "80;90a".
SEQPAR_ATTN_EXPORT const char* seqpar_attn_architectures(void);
// What an error code of the functions below means and what to do about it.
SEQPAR_ATTN_EXPORT const char* seqpar_attn_error(int32_t code);

// 0, a positive cudaError_t, or a negative code of this library. The current device must be that of the pointers.
SEQPAR_ATTN_EXPORT int32_t seqpar_attn_forward(const SeqparForward* arguments, void* stream);
SEQPAR_ATTN_EXPORT int32_t seqpar_attn_backward(const SeqparBackward* arguments, void* stream);
SEQPAR_ATTN_EXPORT int32_t seqpar_attn_delta(const SeqparDelta* arguments, void* stream);
SEQPAR_ATTN_EXPORT int32_t seqpar_attn_finish_dq(const SeqparFinishDq* arguments, void* stream);
SEQPAR_ATTN_EXPORT int32_t seqpar_attn_merge(const SeqparMerge* arguments, void* stream);
SEQPAR_ATTN_EXPORT int32_t seqpar_attn_accumulate(const SeqparAccumulate* arguments, void* stream);
// How many ints a launch's `counter` has.
SEQPAR_ATTN_EXPORT int64_t seqpar_attn_forward_counters(const SeqparForward* arguments);
SEQPAR_ATTN_EXPORT int64_t seqpar_attn_backward_counters(const SeqparBackward* arguments);

#ifdef __cplusplus
}
#endif
#endif
