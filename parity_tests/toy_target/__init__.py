"""A target of another package: all that one needs, outside `src/`.

Its files are ONNX graphs with their bytes reversed, so that whatever takes them for the ONNX target's fails at once.
"""

from onetrans.runtime.targets import Target

TOY = Target(
    name="toy",
    precisions=("fp32",),
    trust="data",
    lowering="parity_tests.toy_target.lowering",
    backends={"toybox": "parity_tests.toy_target.backend:ToyBackend"},
    serve_packages=(("numpy",), ("toy-engine",)),
    file_check="parity_tests.toy_target.backend:check_file",
)

# The same, whose files are said to be programs.
TOY_CODE = Target(
    name="toy-code",
    precisions=("fp32",),
    trust="code",
    lowering="parity_tests.toy_target.lowering",
    backends={"toybox": "parity_tests.toy_target.backend:ToyBackend"},
)
