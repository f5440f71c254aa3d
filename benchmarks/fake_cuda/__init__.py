"""A CUDA card without memory or arithmetic, for machines that have none.

PyTorch's fake tensors know shapes, dtypes and devices, but hold nothing. On a CUDA device they take
the branches that only CUDA takes (fp16 autocast, loss scaling, fused dropout and AdamW), in the
shapes of real models; what is alive can be counted, and what every operation computes and moves. So
mistakes in devices and dtypes show, and the peak of a step to the byte, but for what kernels and
libraries take inside themselves. No second of a GPU can be learned from it.
"""
