"""The zoo: tiny models of many architectures, each with the truth about what its weights do."""

from tests.zoo.architecture import Architecture
from tests.zoo.attention import ATTENTION
from tests.zoo.decoders import DECODERS
from tests.zoo.encoders import ENCODERS
from tests.zoo.fresh import FRESH
from tests.zoo.fused import FUSED
from tests.zoo.held_out import HELD_OUT as FIRST_HELD_OUT
from tests.zoo.plain import PLAIN
from tests.zoo.seq2seq import SEQ2SEQ
from tests.zoo.vision import VISION

HELD_OUT: dict[str, Architecture] = FIRST_HELD_OUT | FRESH
ZOO: dict[str, Architecture] = ATTENTION | FUSED | PLAIN | ENCODERS | DECODERS | SEQ2SEQ | VISION

__all__ = ["HELD_OUT", "ZOO", "Architecture"]
