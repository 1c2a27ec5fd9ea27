from derta.data.packs.packing import (
    Collator as Collator,
    DertaCollator as DertaCollator,
    PackedBatch as PackedBatch,
    TokenCount as TokenCount,
    count_tokens as count_tokens,
    pack as pack,
    packed_length as packed_length,
    sequence_length as sequence_length,
)
from derta.data.packs.planning import Plan as Plan, plan_packs as plan_packs
from derta.data.packs.shares import LossShares as LossShares, loss_shares as loss_shares
from derta.data.packs.show import render_pack as render_pack
from derta.data.packs.steps import (
    EncodedRecords as EncodedRecords,
    PackedSteps as PackedSteps,
    encode_records as encode_records,
)
from derta.data.records.formats import FORMATS as FORMATS, KINDS as KINDS, ROLES as ROLES
from derta.data.records.reading import (
    Reading as Reading,
    as_request as as_request,
    read_records as read_records,
    read_requests as read_requests,
)
from derta.data.records.sources import (
    Source as Source,
    SourceRecords as SourceRecords,
    source_records as source_records,
)
from derta.data.records.types import (
    Dialogue as Dialogue,
    Message as Message,
    Record as Record,
    Rendered as Rendered,
    Request as Request,
    Triple as Triple,
)
from derta.data.tokens.chat import Chat as Chat
from derta.data.tokens.encoding import (
    Encoded as Encoded,
    EncodedDialogue as EncodedDialogue,
    EncodedTriple as EncodedTriple,
    Encoder as Encoder,
)
from derta.data.tokens.refusal import (
    RefusalSet as RefusalSet,
    RefusalToken as RefusalToken,
    choose_refusal_set as choose_refusal_set,
    choose_refusal_token as choose_refusal_token,
    resolve_refusal_token as resolve_refusal_token,
)
from derta.data.tokens.store import ExampleStore as ExampleStore
from derta.data.tokens.templates import CHAT_TEMPLATES as CHAT_TEMPLATES
from derta.objectives.base import Drawn as Drawn
from derta.objectives.cuts import (
    CUT_POLICIES as CUT_POLICIES,
    RTO_DEPTHS as RTO_DEPTHS,
    cut_probabilities as cut_probabilities,
    draw_cuts as draw_cuts,
    draw_rto_rows as draw_rto_rows,
    example_rng as example_rng,
    rto_depth_weights as rto_depth_weights,
)
