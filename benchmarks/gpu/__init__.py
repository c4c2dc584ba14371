"""What only a GPU can show, a row of a table each: `python -m benchmarks.gpu.table`; docs/gpu_proof.md says what they mean.

Every row is a module with `measure(device)`, which yields its lines as it measures them. With `--device cpu` it takes the
same way at a tiny size, and claims nothing that needs a GPU.
"""
