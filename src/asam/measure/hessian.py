"""The Hessian of the loss as an operator: products with vectors, by double backward.

With a geometry it is T H T, the Hessian in units of the weights: u'THTu is the curvature along e = T u, and for a ReLU
network, with eta = 0 and biases scaled, it does not change when the network is rescaled.
"""

from typing import Any

import torch
from torch import Tensor

from ..geometry import Geometry
from .objective import Objective, check_objective


class HessianOperator:
    """A symmetric matrix over all parameters, given by its products.

    Attributes:
        shape: (k, k), k the number of elements of the parameters.
        scales: the diagonal T of a geometry, a vector; None without one.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> operator = hessian(objective, geometry=Geometry("layerwise", eta=0))  # T is the norm of the layer
        >>> operator.shape, bool((operator.scales == operator.scales[0]).all())
        ((2, 2), True)
    """

    def __init__(self, objective: Objective, geometry: Geometry | None = None) -> None:
        check_objective(objective)
        self.objective, self._looked = objective, False
        k = objective.like.numel()
        self.shape = (k, k)
        self.dtype, self.device = objective.like.dtype, objective.like.device
        self.scales: Tensor | None = None
        if geometry is not None:
            self.scales = objective.scales(geometry)

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector (k,), or with every column of a matrix (k, n) in one pass over the data.

        Raises:
            TypeError: the vector is no tensor, or complex.
            ValueError: it has another length, or autograd cannot differentiate the gradient of the loss.
        """
        if not isinstance(vector, Tensor):
            raise TypeError(f"a product takes a torch tensor, got {type(vector).__name__}: for NumPy use as_scipy()")
        if vector.is_complex():
            raise TypeError(f"a product takes a real vector, got {vector.dtype}")
        if vector.ndim not in (1, 2) or vector.shape[0] != self.shape[0]:
            raise ValueError(
                f"a product takes a vector of shape ({self.shape[0]},) or a matrix of such columns, "
                f"got shape {tuple(vector.shape)}"
            )
        vectors = vector.reshape(self.shape[0], -1).T.to(self.device, self.dtype)
        if self.scales is not None:
            vectors = vectors * self.scales
        pieces, look = self.objective.pieces, not self._looked
        products = self.objective.run(lambda evaluation: evaluation.hessian_product(pieces, vectors, look=look))
        self._looked = True
        if self.scales is not None:
            products = products * self.scales
        return products.T.reshape(vector.shape).to(self.dtype)  # the model may have another since

    def __matmul__(self, vector: Tensor) -> Tensor:
        return self.matvec(vector)

    def as_scipy(self) -> Any:
        """The operator as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
            >>> hessian(objective).as_scipy() @ [1.0, 0.0]  # the Hessian is 2 x x'
            array([2., 4.], dtype=float32)
        """
        from scipy.sparse.linalg import LinearOperator

        def product(array: Any) -> Any:
            vector = torch.tensor(array.copy(), device=self.device)  # torch takes no negative strides
            return self.matvec(vector).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=numpy_dtype)


def hessian(objective: Objective, *, geometry: Geometry | None = None) -> HessianOperator:
    """The Hessian H of the mean loss at the model's weights, or T H T with a geometry.

    T is that of the weights now; the products are taken at the weights of the time of the product.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.tensor([[1.0, 2.0]])])
        >>> hessian(objective) @ torch.tensor([1.0, 0.0])
        tensor([2., 4.])
    """
    return HessianOperator(objective, geometry)
