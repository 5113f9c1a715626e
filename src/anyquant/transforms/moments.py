"""What is known of T x, from what is known of x."""

import numpy as np

from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.transforms.operations import Operation, Scale


def map_moments(moments: Moments, operation: Operation) -> Moments:
    """Statistics of `operation` x. A rotation needs the hessian; then the largest absolute value is not known.

    Raises AnyQuantError when the size differs or a rotation has no hessian.
    """
    if moments.second_moment.shape != (operation.size,):
        raise AnyQuantError(
            f"{operation.kind} of {operation.size} channels, statistics of {moments.second_moment.size}"
        )
    hessian, cross = (_both_sides(array, operation) for array in (moments.hessian, moments.cross))
    mean = None if moments.mean is None else operation.apply(moments.mean[None])[0]
    if operation.kind not in ("scale", "permute"):
        if hessian is None:
            raise AnyQuantError(f"statistics cannot follow a {operation.kind} operation without the hessian")
        second = np.ascontiguousarray(np.diagonal(hessian))
        return Moments(second, moments.count, None, mean, hessian, cross)
    second, largest = map_diagonal(moments.second_moment, operation), moments.absolute_maximum
    if largest is not None:
        positive = Scale(np.abs(operation.values)) if isinstance(operation, Scale) else operation
        largest = positive.apply(largest[None])[0]
    return Moments(second, moments.count, largest, mean, hessian, cross)


def map_diagonal(second_moment: Float32, operation: Operation) -> Float32:
    """The second moments after a scaling or a permutation."""
    if isinstance(operation, Scale):
        squared: Float32 = second_moment * np.square(operation.values)
        return squared
    moved: Float32 = operation.apply(second_moment[None])[0]
    return moved


def _both_sides(matrix: Float32 | None, operation: Operation) -> Float32 | None:
    """T M T^T."""
    if matrix is None:
        return None
    both: Float32 = operation.apply_down(operation.apply(matrix))
    return both
