"""The trace of a symmetric operator from a few products with random vectors.

Hutch++ (Meyer et al., 2021, arXiv:2010.09649): a third of the products finds the range Q of the large eigenvalues,
a third takes the trace there exactly, and Hutchinson's estimate covers the rest:

    tr A = tr(Q'AQ) + mean of g'(I - QQ') A (I - QQ') g,    g random signs
"""

from dataclasses import dataclass

import torch

from ..checks import check_count
from .draws import draw
from .lanczos import NotFinite, Operator, check_operator


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace, its standard error (of the random part), and the products it took.

    Example:
        >>> from asam.measure import Objective, hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> found = trace(hessian(objective))  # exact for an operator as small as this
        >>> round(found.value, 4), round(found.stderr, 4)
        (10.0, 0.0)
    """

    value: float
    stderr: float
    matvecs: int


def trace(operator: Operator, *, matvecs: int = 30, seed: int = 0) -> Trace:
    """The trace of a symmetric operator by Hutch++; exact for small operators and those of low rank.

    Args:
        operator: such as `hessian(objective)`.
        matvecs: products to take, at least 6.
        seed: of the random vectors.

    Raises:
        ValueError, TypeError: an argument is not one of the above, or a product is not finite.

    Example:
        >>> from asam.measure import Objective, hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> round(trace(hessian(objective)).value, 4)  # 2 ||x||^2
        10.0
    """
    check_operator(operator)
    check_count("matvecs", matvecs, 6)
    size, third = operator.shape[0], matvecs // 3
    like = torch.empty(size, dtype=operator.dtype, device=operator.device)
    sketch = torch.stack([draw(like, seed, index, "signs") for index in range(min(third, size))], dim=1)
    if third < size:
        sketch = operator.matvec(sketch)
    # in float64, for a basis that is orthogonal to the last bit that the products have
    basis = torch.linalg.qr(sketch.double()).Q
    products = operator.matvec(basis.to(operator.dtype)).double()
    if not products.isfinite().all():
        raise NotFinite("a product of the operator is not finite: it has no trace")
    known = float((basis * products).sum())
    if third >= size:
        return Trace(known, 0.0, size)
    signs = torch.stack([draw(like, seed, third + i, "signs") for i in range(matvecs - 2 * third)], dim=1).double()
    rest = signs - basis @ (basis.T @ signs)
    samples = (rest * operator.matvec(rest.to(operator.dtype)).double()).sum(dim=0)
    stderr = float(samples.std() / len(samples) ** 0.5)
    return Trace(known + float(samples.mean()), stderr, matvecs)
