"""How XLA compiles in tests on the CPU, in the tests' process and in those that they start."""

from importlib.metadata import version

# Most of a test's time is compiling tiny programs: the machine code need not be good. Of compiling, the emitters of
# fused kernels take four fifths; later versions of XLA have nothing else, and end at a flag that they do not know.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
QUICK = " ".join(_FLAGS)
