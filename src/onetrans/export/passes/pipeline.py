"""The default pipeline: what every captured forward goes through before it is split."""

from onetrans.export.passes.base import Pass
from onetrans.export.passes.constant_folding import ConstantFolding
from onetrans.export.passes.dead_code import DeadCode
from onetrans.export.passes.partial_product import PartialProduct
from onetrans.export.passes.state_names import StateNames

DEFAULT: tuple[Pass, ...] = (DeadCode(), PartialProduct(), ConstantFolding(), StateNames())
