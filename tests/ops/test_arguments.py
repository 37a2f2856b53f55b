"""Bad arguments: every public function says at once what was given and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.ops import arguments

FUNCTIONS = {
    "spectral_norm": sk.spectral_norm,
    "singular_triplet": sk.singular_triplet,
    "spectral_bounds": sk.spectral_bounds,
    "stable_rank": sk.stable_rank,
    "leading_subspace": lambda A, tol=1e-3, **more: sk.leading_subspace(A, 1, tol, **more),
    "spectral_norm_": lambda W, tol=1e-3, **more: sk.spectral_norm_(W, 1.0, tol=tol, **more),
    "explain": lambda A: sk.explain("spectral_norm", A),
}
WITH_TOL = [name for name in FUNCTIONS if name not in ("spectral_bounds", "explain")]
WITH_SEED = [name for name in FUNCTIONS if name != "explain"]


def quantized():
    return torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)


class DTensor(torch.Tensor):
    """Stands in for torch.distributed.tensor.DTensor, which needs a process group."""


NOT_MATRICES = [
    (lambda: [[1.0, 2.0]], TypeError, r"A\[0\] must be a torch.Tensor, not list"),
    (lambda: 3.0, TypeError, r"must be a torch.Tensor, not float"),
    (lambda: None, TypeError, r"must be a torch.Tensor, not NoneType"),
    (lambda: "weight", TypeError, r"must be a torch.Tensor, not str"),
    (lambda: torch.randn(3, 4).numpy(), TypeError, r"must be a torch.Tensor, not ndarray"),
    (lambda: torch.randint(0, 9, (3, 4)), TypeError, r"float32, float64, bfloat16 or float16; torch.int64"),
    (lambda: torch.ones(3, 4, dtype=torch.uint8), TypeError, r"torch.uint8"),
    (lambda: torch.ones(3, 4, dtype=torch.bool), TypeError, r"torch.bool"),
    (lambda: torch.ones(3, 4, dtype=torch.complex64), TypeError, r"torch.complex64 is complex"),
    (lambda: torch.ones(3, 4).to(torch.float8_e4m3fn), TypeError, r"torch.float8_e4m3fn"),
    (lambda: torch.eye(4).to_sparse(), TypeError, r"dense \(strided\) tensor, not torch.sparse_coo"),
    (lambda: torch.eye(4).to_sparse_csr(), TypeError, r"not torch.sparse_csr"),
    (quantized, TypeError, r"torch.qint8 is quantized"),
    (lambda: torch.tensor(1.0), ValueError, r"at least 2 dimensions .*not shape \(\)"),
    (lambda: torch.ones(5), ValueError, r"at least 2 dimensions .*not shape \(5,\)"),
    (lambda: torch.randn(3, 4).as_subclass(DTensor), TypeError, r"is a DTensor: sharded tensors are not served"),
]


@pytest.mark.filterwarnings("ignore:.*quantize.*", "ignore:Sparse CSR", "ignore:Sparse invariant")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", range(len(NOT_MATRICES)))
def test_what_is_not_a_matrix(function, bad):
    build, error, message = NOT_MATRICES[bad]
    with pytest.raises(error, match=message):
        FUNCTIONS[function](build())
    if bad:  # inside a list it is named by its place
        with pytest.raises(error, match=r"A\[1\] (must|is)"):
            FUNCTIONS[function]([torch.randn(3, 4), build()])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_lists_hold_one_dtype_and_device(function):
    call = FUNCTIONS[function]
    with pytest.raises(ValueError, match=r"one dtype and device: A\[0\] is torch.float32 .*A\[1\] is torch.float64"):
        call([torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"A\[2\] is torch.float32 on meta"):
        call([torch.randn(3, 4), torch.randn(3, 4), torch.empty(3, 4, device="meta")])


@pytest.mark.parametrize("function", WITH_TOL)
@pytest.mark.parametrize("tol", [0, 0.0, -1e-3, math.nan, math.inf, 1.0, 2, 1e-7, -math.inf])
def test_tolerances_out_of_reach(function, tol):
    for A in (torch.randn(30, 40), [torch.randn(30, 40)], torch.randn(2, 3, 4).bfloat16()):
        with pytest.raises(ValueError, match=r"tol must lie in \[1.9e-06, 1\) for torch.\w+, not "):
            FUNCTIONS[function](A, tol)
    with pytest.raises(ValueError, match=r"tol must lie in \[3.6e-15, 1\) for torch.float64"):
        FUNCTIONS[function](torch.randn(3, 4).double(), min(tol, 1e-15) if tol < 1 else tol)


@pytest.mark.parametrize("function", WITH_TOL)
@pytest.mark.parametrize("tol", [None, "1e-3", True, 1e-3 + 0j])
def test_tolerances_that_are_no_numbers(function, tol):
    with pytest.raises(TypeError, match=f"tol must be a number, not {type(tol).__name__}"):
        FUNCTIONS[function](torch.randn(3, 4), tol)


@pytest.mark.parametrize("method", ["krylov", "power", "gram", "svd"])
def test_the_least_tolerances_are_served(method):
    A = torch.randn(30, 20)
    for dtype, tol in ((torch.float32, 16 * 2.0**-23), (torch.float64, 16 * 2.0**-52), (torch.float16, 16 * 2.0**-23)):
        value = sk.spectral_norm(A.to(dtype), tol, method=method)
        assert float(value) == pytest.approx(float(torch.linalg.matrix_norm(A.to(dtype).double(), 2)), rel=2 * tol)


@pytest.mark.parametrize("function", WITH_SEED)
def test_seeds(function):
    call, A = FUNCTIONS[function], torch.randn(6, 5)
    for seed in (1.0, "0", None, True, torch.tensor(1)):
        with pytest.raises(TypeError, match=f"seed must be an integer, not {type(seed).__name__}"):
            call(A.clone(), seed=seed)
    for seed in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(ValueError, match=rf"seed must be in \[-{1 << 63}, {(1 << 63) - 1}\], not {seed}"):
            call(A.clone(), seed=seed)
    for seed in (0, -1, (1 << 63) - 1, -(1 << 63)):
        call(A.clone(), seed=seed)


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    A = torch.randn(150, 200)
    value = sk.spectral_norm(A, seed=numpy.int64(3), steps=numpy.int32(2))
    assert torch.equal(value, sk.spectral_norm(A, seed=3, steps=2))
    assert torch.equal(sk.spectral_norm(A, numpy.float32(1e-3)), sk.spectral_norm(A, float(numpy.float32(1e-3))))


def test_methods_and_their_options():
    A = torch.randn(6, 5)
    _, block = sk.spectral_norm(A, return_block=True)
    for method in ("lanczos", "", None, 3, "SVD"):
        with pytest.raises(ValueError, match=r"method must be one of 'krylov', 'power', 'gram', 'svd', not "):
            sk.spectral_norm(A, method=method)
    for method in ("power", "gram", "svd"):
        for options in ({"v0": block}, {"return_block": True}):
            with pytest.raises(ValueError, match=f"v0 and return_block go with method='krylov', not '{method}'"):
                sk.spectral_norm(A, method=method, **options)
    for method in ("gram", "svd"):
        with pytest.raises(ValueError, match=f"steps goes with method='krylov' or 'power', not '{method}'"):
            sk.spectral_norm(A, method=method, steps=3)


@pytest.mark.parametrize("call", [sk.spectral_norm, sk.singular_triplet])
def test_steps(call):
    A = torch.randn(6, 5)
    for steps in (0, -1, 4097):
        with pytest.raises(ValueError, match=rf"steps must be in \[1, 4096\], not {steps}"):
            call(A, steps=steps)
    for steps in (1.0, "2", True):
        with pytest.raises(TypeError, match=f"steps must be an integer, not {type(steps).__name__}"):
            call(A, steps=steps)


def test_dim():
    A = torch.randn(3, 4, 5)
    for dim in ((0, 0), (1, -2), (-1, 2)):
        with pytest.raises(ValueError, match="dim must name two different dimensions"):
            sk.spectral_norm(A, dim=dim)
    for dim in (1, (0,), (0, 1, 2), None, "01"):
        with pytest.raises(ValueError, match="dim must be a pair of dimensions"):
            sk.spectral_norm(A, dim=dim)
    for dim in ((0, 3), (-4, 1)):
        with pytest.raises(ValueError, match=r"dim must be in \[-3, 2\]"):
            sk.spectral_norm(A, dim=dim)
    with pytest.raises(TypeError, match="dim must be an integer, not float"):
        sk.spectral_norm(A, dim=(0.0, 1))
    with pytest.raises(ValueError, match="dim is for tensors"):
        sk.spectral_norm([A], dim=(0, 1))


@pytest.mark.parametrize("call", [sk.spectral_norm, sk.singular_triplet])
def test_start_blocks(call):
    A = torch.randn(2, 30, 20)
    _, block = sk.spectral_norm(A, return_block=True)
    assert block.shape == (2, 4, 20)
    call(A, v0=block)
    bad = [block[0], block[:, :3], block[..., :19], block.mT, block[None]]
    bad += [block.double(), block.to("meta"), block.half()]
    for v0 in bad:
        with pytest.raises(ValueError, match=r"v0 must have shape \(2, 4, 20\), torch.float32 on cpu, not "):
            call(A, v0=v0)
    for v0 in (3, "block", block.numpy()):
        with pytest.raises(TypeError, match="v0 must be a tensor or a list of tensors, not "):
            call(A, v0=v0)
    for v0 in ([], [block, block]):
        with pytest.raises(ValueError, match=f"v0 must hold one block per entry of A: 1, not {len(v0)}"):
            call([A], v0=v0)
    with pytest.raises(ValueError, match=r"v0 must have shape \(2, 4, 20\), torch.float32 on cpu"):
        call(A.bfloat16(), v0=block.bfloat16())  # blocks of half matrices are float32
    call(A.bfloat16(), v0=block)


def test_rank():
    A = torch.randn(2, 6, 5)
    for rank in (0, -1, 6, 1 << 70):
        with pytest.raises(ValueError, match=rf"rank must be in \[1, 5\], not {rank}"):
            sk.leading_subspace(A, rank)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 3\], not 4"):  # the smallest of a list decides
        sk.leading_subspace([A, torch.randn(3, 9)], 4)
    for rank in (2.0, "2", None, True):
        with pytest.raises(TypeError, match=f"rank must be an integer, not {type(rank).__name__}"):
            sk.leading_subspace(A, rank)


def test_targets_and_modes():
    W = torch.randn(6, 5)
    before = W.clone()
    for target in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="target must be a finite number above 0, not "):
            sk.spectral_norm_(W, target)
    for target in (None, [1.0], True, torch.tensor(1.0), 1j):
        with pytest.raises(TypeError, match="target must be a number"):
            sk.spectral_norm_(W, target)
    with pytest.raises(ValueError, match=r"target must be a number or one of rms_to_rms, original.*not 'rms'"):
        sk.spectral_norm_(W, "rms")
    for mode in ("clip", None, 1):
        with pytest.raises(ValueError, match=r"mode must be one of 'normalize', 'cap', not "):
            sk.spectral_norm_(W, mode=mode)
    assert torch.equal(W, before)


def test_nothing_is_written_where_one_of_a_list_is_refused():
    W = [torch.randn(6, 5), torch.randn(6, 5, dtype=torch.float64)]
    before = [w.clone() for w in W]
    with pytest.raises(ValueError, match="one dtype and device"):
        sk.spectral_norm_(W)
    assert all(torch.equal(w, b) for w, b in zip(W, before, strict=True))


def test_arguments_are_checked_before_anything_is_skipped():
    """An empty list excuses no bad option."""
    with pytest.raises(ValueError, match="method"):
        sk.spectral_norm([], method="lanczos")
    with pytest.raises(TypeError, match="seed"):
        sk.spectral_norm([], seed="0")
    with pytest.raises(ValueError, match="mode"):
        sk.spectral_norm_([], mode="clip")


def test_a_real_dtensor_is_refused():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.tensor import DTensor as Sharded
    from torch.distributed.tensor import Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        A = Sharded.from_local(torch.randn(3, 4), mesh, [Shard(0)])
        for name, call in FUNCTIONS.items():
            with pytest.raises(TypeError, match="is a DTensor: sharded tensors are not served yet"):
                call(A)
            with pytest.raises(TypeError, match=r"A\[0\] is a DTensor"):
                call([A]), name
        assert float(sk.spectral_norm(A.to_local())) > 0
    finally:
        distributed.destroy_process_group()


def test_ragged_views_share_memory():
    """The way into the words copies nothing that can be viewed."""
    for A in (torch.randn(3, 4), torch.randn(2, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(4, 3).mT):
        batch = arguments.ragged(A)
        assert batch.stacks[0].data_ptr() == A.data_ptr() and batch.stacks[0].ndim == 3
        assert batch.batches == [tuple(A.shape[:-2])] and not batch.is_list
    moved = arguments.ragged(torch.randn(3, 4, 5), (0, 2))
    assert moved.stacks[0].shape == (4, 3, 5) and moved.batches == [(4,)]
