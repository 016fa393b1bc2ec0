"""How XLA compiles in tests on the CPU, in the tests' process and in those that they start."""

# Most of a test's time is compiling tiny programs: the machine code need not be good. Of compiling, the emitters of
# fused kernels take four fifths.
QUICK = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
