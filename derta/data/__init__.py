"""Data: from record files to packs, see the modules in the order of their names below."""

from __future__ import annotations

from derta.data.chat import Chat
from derta.data.cuts import (
    CUT_POLICIES,
    RTO_DEPTHS,
    cut_probabilities,
    draw_cuts,
    draw_rto_rows,
    example_rng,
    rto_depth_weights,
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
from derta.data.reading import Reading, as_request, read_records, read_requests
from derta.data.records import Dialogue, Message, Record, Rendered, Request, Triple
from derta.data.refusal import RefusalToken, choose_refusal_token, resolve_refusal_token
from derta.data.shares import LossShare, loss_shares
from derta.data.show import render_pack
from derta.data.sources import Source, source_records
from derta.data.steps import EncodedRecords, PackedSteps, encode_records
from derta.data.store import ExampleStore

__all__ = [
    "CUT_POLICIES",
    "FORMATS",
    "KINDS",
    "ROLES",
    "RTO_DEPTHS",
    "Chat",
    "DertaCollator",
    "Dialogue",
    "Drawn",
    "Encoded",
    "EncodedDialogue",
    "EncodedRecords",
    "EncodedTriple",
    "Encoder",
    "ExampleStore",
    "LossShare",
    "Message",
    "PackedBatch",
    "PackedSteps",
    "Plan",
    "Record",
    "Reading",
    "RefusalToken",
    "Rendered",
    "Request",
    "Source",
    "TokenCount",
    "Triple",
    "as_request",
    "choose_refusal_token",
    "count_tokens",
    "cut_probabilities",
    "draw_cuts",
    "draw_rto_rows",
    "encode_records",
    "example_rng",
    "loss_shares",
    "pack",
    "packed_length",
    "plan_packs",
    "read_records",
    "read_requests",
    "render_pack",
    "resolve_refusal_token",
    "rto_depth_weights",
    "sequence_length",
    "source_records",
]
