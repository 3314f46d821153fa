"""The default pipeline: what every captured forward goes through before it is split."""

DEFAULT: tuple[Pass, ...] = (DeadCode(), PartialProduct(), ConstantFolding(), StateNames())
