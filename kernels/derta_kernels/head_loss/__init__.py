"""The two-target loss of a vocabulary projection; see `head_loss`."""

from derta_kernels.head_loss.choice import choose
from derta_kernels.head_loss.chunked import working_bytes
from derta_kernels.head_loss.chunks import Chip, chip_of
from derta_kernels.head_loss.head import Head
from derta_kernels.head_loss.op import HeadLoss, head_loss
from derta_kernels.head_loss.shards import sent_bytes
from derta_kernels.head_loss.token_set import checked_ids

__all__ = [
    "Chip",
    "Head",
    "HeadLoss",
    "checked_ids",
    "chip_of",
    "choose",
    "head_loss",
    "sent_bytes",
    "working_bytes",
]
