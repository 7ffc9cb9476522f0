"""Triton's interpreter, as a GPU would compute."""

from __future__ import annotations

import torch


def mend() -> None:
    """The interpreter truncates float32 to bfloat16 where every GPU rounds to nearest, multiplies the bits of matrices
    of bfloat16 as if they were integers, and that of Triton 3.6 uses a conversion of one-element arrays that NumPy 2.4
    refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    truncating, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def rounding(data, source, target, mode):  # type: ignore[no-untyped-def]
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data).to(torch.bfloat16).view(torch.uint16).numpy()
        return truncating(data, source, target, mode)

    def patch_tensor_and_index(tensor, scope):  # type: ignore[no-untyped-def]
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    multiply = interpreter.InterpreterBuilder.create_dot

    def wide(matrix):  # type: ignore[no-untyped-def]
        if matrix.dtype != tl.bfloat16:
            return matrix
        data = torch.from_numpy(matrix.data).view(torch.bfloat16).float().numpy()
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        return multiply(self, wide(a), wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float, interpreter._patch_lang_tensor = rounding, patch_tensor_and_index
