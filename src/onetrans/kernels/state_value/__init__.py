"""state_value: what a user-scope value is called and what it is in the user's state."""

from onetrans.kernels.state_value.op import Role, state_value

__all__ = ["Role", "state_value"]
