"""The ops, a folder each: `op.py` the public functions and what is declared behind them,
`reference.py` the same in plain PyTorch, `triton_kernels.py`; C++ and CUDA are in csrc/, under the
same name. `common/` is what they share.
"""
