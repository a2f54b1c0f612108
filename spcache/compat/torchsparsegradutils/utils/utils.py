"""Sparse matrices stacked, put on a diagonal, taken apart and converted; all differentiable in the values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "convert_coo_to_csr",
    "convert_coo_to_csr_indices_values",
    "sparse_block_diag",
    "sparse_block_diag_split",
    "sparse_eye",
    "stack_csr",
]


def stack_csr(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """[batch, m, n] CSR of matrices [m, n] with equal numbers of entries; dim must be 0, where CSR has its batch."""
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"Expected a list of tensors, but got {type(tensors)}.")
    if not tensors:
        raise ValueError("Cannot stack empty list of tensors.")
    if any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError("All tensors must have the same shape.")
    if any(t.layout is not torch.sparse_csr for t in tensors):
        raise ValueError("All tensors must be in CSR layout.")
    if any(t.dim() != 2 for t in tensors):
        raise ValueError("All tensors must be 2D.")
    if dim not in (0, -3):
        raise ValueError(f"dim must be 0: CSR has its batch dimensions in front, got {dim}")
    nnz = [t.values().numel() for t in tensors]
    if len(set(nnz)) > 1:
        raise ValueError(f"All tensors must have the same number of entries, got {nnz}; a batch of COO may differ")
    crow, col, values = (torch.stack(p) for p in zip(*map(_parts, tensors), strict=True))
    return torch.sparse_csr_tensor(crow, col, values, (len(tensors), *tensors[0].shape))


def convert_coo_to_csr_indices_values(
    coo_indices: Tensor, num_rows: int, values: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of a CSR matrix, or of a batch, from entries in any order.

    Args:
        coo_indices: [2, nnz] rows and columns, or [3, nnz] with the batch element in front.
        values: [nnz].

    Returns:
        (crow, col, values): [num_rows + 1], [nnz], [nnz], or [batch, num_rows + 1], [batch, nnz / batch] twice.
        Without values, in their place the number of the entry that went there.
    """
    return _compressed(coo_indices, num_rows, values, None)


def _compressed(
    coo_indices: Tensor, num_rows: int, values: Tensor | None, blocks: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """blocks: how many the batch has; None: up to the last one that has an entry."""
    kinds, nnz = coo_indices.shape
    if kinds < 2:
        raise ValueError(f"Indices tensor must have at least 2 rows (row and column indices). Got {kinds} rows.")
    if kinds > 3:
        raise ValueError(f"Indices tensor must have at most 3 rows (batch, row and column indices). Got {kinds} rows.")
    *batch, row, col = coo_indices
    if nnz and row.max() >= num_rows:
        raise ValueError(f"Row indices must be less than num_rows ({num_rows}). Got max row index {row.max()}")
    if values is not None and len(values) != nnz:
        raise ValueError(f"Number of values ({len(values)}) does not match number of indices ({nnz})")
    if blocks is None:
        blocks = int(batch[0].max()) + 1 if batch and nnz else 1
    place = batch[0].long() * num_rows + row if batch else row.long()  # the row in all blocks below each other
    order = torch.argsort(col, stable=True)
    order = order[torch.argsort(place[order], stable=True)]
    counts = torch.bincount(place, minlength=blocks * num_rows).view(blocks, num_rows)
    if batch and (counts.sum(1) * blocks != nnz).any():
        raise ValueError(f"A batch in CSR needs equally many entries in each element, got {counts.sum(1).tolist()}")
    crow = torch.nn.functional.pad(counts.cumsum(1), (1, 0)).to(row.dtype)
    shape = blocks, nnz // max(blocks, 1)
    parts = crow, col[order].view(shape), (order if values is None else values[order]).view(shape)
    return parts if batch else (parts[0][0], parts[1][0], parts[2][0])


def convert_coo_to_csr(sparse_coo_tensor: Tensor) -> Tensor:
    """The same matrix, or batch, in CSR; also in three dimensions, where `to_sparse_csr` refuses."""
    A = sparse_coo_tensor
    if A.layout is not torch.sparse_coo:
        raise ValueError(f"Unsupported layout: {A.layout}")
    A = A.coalesce()
    blocks = A.shape[0] if A.dim() == 3 else None
    return torch.sparse_csr_tensor(*_compressed(A.indices(), A.shape[-2], A.values(), blocks), A.shape)


def sparse_block_diag(*sparse_tensors: Tensor) -> Tensor:
    """[sum m, sum n] with matrices [m, n], all COO or all CSR, on the diagonal, in their layout."""
    for i, t in enumerate(sparse_tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"expected Tensor as element {i} in argument 0, but got {type(t).__name__}")
    if not sparse_tensors:
        raise ValueError("At least one sparse tensor must be provided.")
    layouts = {t.layout for t in sparse_tensors}
    if layouts not in ({torch.sparse_coo}, {torch.sparse_csr}):
        raise ValueError("Sparse tensors must either be all sparse_coo or all sparse_csr.")
    if any(t.sparse_dim() != 2 for t in sparse_tensors):
        raise ValueError("All sparse tensors must have exactly two sparse dimensions.")
    if any(t.dense_dim() != 0 for t in sparse_tensors):
        raise ValueError("All sparse tensors must have zero dense dimensions.")
    if len(sparse_tensors) == 1:
        return sparse_tensors[0]
    first, second, values = zip(*map(_parts, sparse_tensors), strict=True)
    m = n = nnz = 0
    firsts: list[Tensor] = []
    seconds: list[Tensor] = []
    for t, p, q in zip(sparse_tensors, first, second, strict=True):
        firsts.append(p + m if t.layout is torch.sparse_coo else p[bool(firsts) :] + nnz)  # rows, or pointers
        seconds.append(q + n)
        m, n, nnz = m + t.shape[0], n + t.shape[1], nnz + len(q)
    shape = (m, n)
    if layouts == {torch.sparse_coo}:
        indices = torch.stack([torch.cat(firsts), torch.cat(seconds)])
        return torch.sparse_coo_tensor(indices, torch.cat(values), shape, is_coalesced=True)
    return torch.sparse_csr_tensor(torch.cat(firsts), torch.cat(seconds), torch.cat(values), shape)


def sparse_block_diag_split(sparse_block_diag_tensor: Tensor, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Undoes `sparse_block_diag`: the blocks of the given shapes. ValueError for an entry outside of them."""
    A = sparse_block_diag_tensor
    if not isinstance(A, Tensor):
        raise TypeError("Input must be a torch.Tensor.")
    if A.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise ValueError("Input tensor layout not supported. Only sparse_coo and sparse_csr are supported.")
    if any(len(s) != 2 for s in shapes):
        raise ValueError("All shapes must be two-dimensional (rows, cols).")
    m, n = sum(s[0] for s in shapes), sum(s[1] for s in shapes)
    if (m, n) != tuple(A.shape):
        raise ValueError(f"Sum of provided block shapes ({m}, {n}) does not match input tensor size {tuple(A.shape)}.")
    first, second, values = _parts(A)
    coo, blocks, i, j = A.layout is torch.sparse_coo, [], 0, 0
    for m, n in shapes:
        start, end = torch.searchsorted(first, first.new_tensor([i, i + m])) if coo else (first[i], first[i + m])
        p = first[start:end] - i if coo else first[i : i + m + 1] - start
        q, v = second[start:end] - j, values[start:end]
        if q.numel() and (q.min() < 0 or q.max() >= n):
            raise ValueError(f"The block at ({i}, {j}) of shape ({m}, {n}) has entries beside it in its rows.")
        if coo:
            blocks.append(torch.sparse_coo_tensor(torch.stack([p, q]), v, (m, n), is_coalesced=True))
        else:
            blocks.append(torch.sparse_csr_tensor(p, q, v, (m, n)))
        i, j = i + m, j + n
    return tuple(blocks)


def sparse_eye(
    size: tuple[int, ...],
    *,
    layout: torch.layout = torch.sparse_coo,
    values_dtype: torch.dtype = torch.float64,
    indices_dtype: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    """The identity [n, n], or [batch, n, n], in COO (whose indices torch makes int64) or CSR."""
    if len(size) < 2:
        raise ValueError("size must have at least 2 dimensions")
    if len(size) > 3:
        raise ValueError("size must have at most 3 dimensions (supports 1 batch dimension)")
    *batch, m, n = size
    if m != n:
        raise ValueError("size must define a square matrix (n, n) or batched square matrix (b, n, n)")
    if values_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Values dtype {values_dtype} not supported. Use torch.float32 or torch.float64.")
    if indices_dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices_dtype {indices_dtype} not supported. Use torch.int32 or torch.int64.")
    pointers = torch.arange(n + 1, dtype=indices_dtype, device=device)
    values = torch.ones(*batch, n, dtype=values_dtype, device=device)
    if layout is torch.sparse_csr:
        crow, col = pointers.expand(*batch, n + 1).contiguous(), pointers[:-1].expand(*batch, n).contiguous()
        return torch.sparse_csr_tensor(crow, col, values, size, requires_grad=requires_grad)
    if layout is torch.sparse_coo:
        indices = torch.cartesian_prod(*(torch.arange(b, device=device) for b in batch), pointers[:-1].long())
        indices = indices.reshape(values.numel(), len(batch) + 1)[:, [*range(len(batch)), -1, -1]].T
        return torch.sparse_coo_tensor(indices, values.flatten(), size, requires_grad=requires_grad, is_coalesced=True)
    raise ValueError(f"Layout {layout} not supported. Only sparse_coo and sparse_csr are supported.")


def _parts(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, or row pointers, columns and values."""
    if A.layout is torch.sparse_coo:
        A = A.coalesce()
        row, col = A.indices()
        return row, col, A.values()
    return A.crow_indices(), A.col_indices(), A.values()
