"""Moving tensors between ranks: groups by name, and the communicator that serves each."""

from __future__ import annotations

from .arena import Cutter, Shape, bytes_of, in_turn
from .base import UNKNOWN, Arena, CommunicationError, Communicator, Handle, Message, agree
from .choice import Choice
from .groups import Group, count_ranks, find_ranks_per_host, group_name
from .loopback import Loopback, LoopbackGroup
from .p2p import P2P
from .transports import communicator, limit_of_environment, peers, set_transport, transport

__all__ = [
    "P2P",
    "UNKNOWN",
    "Arena",
    "Choice",
    "CommunicationError",
    "Communicator",
    "Cutter",
    "Group",
    "Handle",
    "Loopback",
    "LoopbackGroup",
    "Message",
    "Shape",
    "agree",
    "bytes_of",
    "communicator",
    "count_ranks",
    "find_ranks_per_host",
    "group_name",
    "in_turn",
    "limit_of_environment",
    "peers",
    "set_transport",
    "transport",
]
