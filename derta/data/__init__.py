"""Data: from record files to packs, see the modules in the order of their names below."""

from __future__ import annotations

from derta.data.chat import Chat
from derta.data.cuts import (
    CUT_POLICIES,
    cut_probabilities,
    draw_cuts,
    draw_rto_rows,
    example_rng,
)
from derta.data.encoding import Encoded, EncodedDialogue, EncodedTriple, Encoder
from derta.data.formats import FORMATS, KINDS, ROLES
from derta.data.packing import (
    DertaCollator,
    Drawn,
    PackedBatch,
    TokenCount,
    count_tokens,
    pack,
    packed_length,
    sequence_length,
)
from derta.data.planning import Plan, plan_packs
from derta.data.reading import Reading, read_records, read_requests
from derta.data.records import Dialogue, Message, Record, Rendered, Request, Triple
from derta.data.refusal import RefusalToken, resolve_refusal_token
from derta.data.show import render_pack

__all__ = [
    "CUT_POLICIES",
    "FORMATS",
    "KINDS",
    "ROLES",
    "Chat",
    "DertaCollator",
    "Dialogue",
    "Drawn",
    "Encoded",
    "EncodedDialogue",
    "EncodedTriple",
    "Encoder",
    "Message",
    "PackedBatch",
    "Plan",
    "Record",
    "Reading",
    "RefusalToken",
    "Rendered",
    "Request",
    "TokenCount",
    "Triple",
    "count_tokens",
    "cut_probabilities",
    "draw_cuts",
    "draw_rto_rows",
    "example_rng",
    "pack",
    "packed_length",
    "plan_packs",
    "read_records",
    "read_requests",
    "render_pack",
    "resolve_refusal_token",
    "sequence_length",
]
