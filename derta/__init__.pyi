from derta._version import __version__ as __version__
from derta.data import (
    DertaCollator as DertaCollator,
    Dialogue as Dialogue,
    Encoder as Encoder,
    Triple as Triple,
    read_records as read_records,
    read_requests as read_requests,
    resolve_refusal_token as resolve_refusal_token,
)
from derta.labels import derta_labels as derta_labels
from derta.loss import (
    DertaLoss as DertaLoss,
    RTOLoss as RTOLoss,
    derta_loss as derta_loss,
    derta_loss_with_rows as derta_loss_with_rows,
    linear_cross_entropy as linear_cross_entropy,
    rto_loss as rto_loss,
)
from derta.modeling.patch import (
    apply_derta as apply_derta,
    check_derta as check_derta,
    remove_derta as remove_derta,
)
from derta.training.config import DertaConfig as DertaConfig
from derta.training.trainer import DertaTrainer as DertaTrainer
