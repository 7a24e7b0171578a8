"""Rotations in the forms that robots record them in, as matrices and as 6 numbers (Zhou et al., 2019).

A network learns the first two columns of the matrix: 6 numbers without the jumps that every shorter form has somewhere.
Any 6 numbers become a rotation again by Gram-Schmidt. Shapes are `[..., numbers of the form]`; computed in the input's
precision.
"""

import itertools

import torch
from torch import Tensor

EULER = {f"euler_{''.join(order)}": order for order in itertools.permutations("xyz")}
EULER |= {f"euler_{''.join(order)}": order for order in itertools.permutations("XYZ")}
QUATERNIONS = ("quaternion_xyzw", "quaternion_wxyz")
# Form -> how many numbers it has. Euler angles are in radians; euler_xyz turns about the fixed axes x, then y, then z
# (roll, pitch, yaw), euler_XYZ about the axes that turn along, as scipy names them. A matrix is row by row; 6d_rows and
# 6d_columns are its first two rows or columns.
WIDTHS = {"axis_angle": 3, **dict.fromkeys(QUATERNIONS, 4), "matrix": 9, "6d_rows": 6, "6d_columns": 6}
WIDTHS |= dict.fromkeys(EULER, 3)
TINY = 1e-9  # shorter vectors have no direction
FAR = 0.05  # largest deviation of recorded numbers from a rotation


def to_matrix(kind: str, x: Tensor) -> Tensor:
    """Rotations `[..., n]` of a form as matrices `[..., 3, 3]`; numbers that are not quite one are orthonormalised."""
    if kind == "axis_angle":
        half = x.square().sum(-1, keepdim=True).sqrt() / 2
        x = torch.cat([torch.sinc(half / torch.pi) / 2 * x, half.cos()], -1)
        kind = "quaternion_xyzw"
    if kind in QUATERNIONS:
        return _of_quaternion(x if kind == "quaternion_xyzw" else x.roll(-1, -1))
    if kind in EULER:
        axes, turns = ["xyz".index(axis.lower()) for axis in EULER[kind]], list(x.unbind(-1))
        first, second, third = (_about(axis, turn) for axis, turn in zip(axes, turns, strict=True))
        return first @ second @ third if kind[-1].isupper() else third @ second @ first
    if kind == "6d_columns":
        return from_columns(x[..., :3], x[..., 3:])
    return from_columns(x[..., :3], x[..., 3:6]).transpose(-1, -2)  # the third row of a matrix follows from these


def from_matrix(kind: str, matrix: Tensor, like: Tensor | None = None) -> Tensor:
    """Rotation matrices `[..., 3, 3]` in a form, `[..., n]`.

    Of the numbers that stand for the same rotation, those are taken that are usual: an angle of at most pi, Euler
    angles whose middle one is at most pi / 2, a quaternion with w >= 0, or the one on the side of `like`.
    """
    if kind in EULER:
        return _euler(kind, matrix)
    if kind in ("matrix", "6d_rows"):
        return matrix.flatten(-2)[..., : WIDTHS[kind]]
    if kind == "6d_columns":
        return matrix[..., :2].transpose(-1, -2).flatten(-2)
    x = _quaternion(matrix)  # w >= 0
    if kind == "axis_angle":
        sine = x[..., :3].square().sum(-1, keepdim=True).sqrt()
        angle = 2 * torch.atan2(sine, x[..., 3:])
        return torch.where(sine > TINY, angle / sine.clamp(min=TINY), torch.full_like(sine, 2)) * x[..., :3]
    x = x if kind == "quaternion_xyzw" else x.roll(1, -1)
    if like is not None:
        x = torch.where((x * like).sum(-1, keepdim=True) < 0, -x, x)
    return x


def from_columns(a: Tensor, b: Tensor) -> Tensor:
    """The rotation whose first column is along `a` `[..., 3]`, and whose second is nearest to `b`: Gram-Schmidt.

    Vectors without a direction of their own are replaced, so that any numbers give a rotation.
    """
    axes = torch.eye(3, dtype=a.dtype, device=a.device)
    size = a.square().sum(-1, keepdim=True).sqrt()
    x = torch.where(size > TINY, a / size.clamp(min=TINY), axes[0].expand_as(a))
    least = (1e-6 * b.square().sum(-1, keepdim=True).sqrt()).clamp(min=TINY)
    b = b - (x * b).sum(-1, keepdim=True) * x
    other = axes[x.abs().argmin(-1)]
    other = other - (x * other).sum(-1, keepdim=True) * x
    b = torch.where(b.square().sum(-1, keepdim=True).sqrt() > least, b, other)
    y = b / b.square().sum(-1, keepdim=True).sqrt()
    y = y - (x * y).sum(-1, keepdim=True) * x  # once more: b may have been nearly along x
    y = y / y.square().sum(-1, keepdim=True).sqrt()
    return torch.stack([x, y, torch.linalg.cross(x, y, dim=-1)], -1)


def nearest(kind: str, x: Tensor, to: Tensor) -> Tensor:
    """The numbers of the same rotations `x` `[..., n]` that are nearest to `to`, to compare two of them."""
    if kind in QUATERNIONS:
        return torch.where((x * to).sum(-1, keepdim=True) < 0, -x, x)
    if kind in EULER:
        return x + 2 * torch.pi * ((to - x) / (2 * torch.pi)).round()
    if kind == "axis_angle":
        angle = x.square().sum(-1, keepdim=True).sqrt()
        axis = torch.where(angle > TINY, x / angle.clamp(min=TINY), torch.zeros_like(x))
        turns = (((to * axis).sum(-1, keepdim=True) - angle) / (2 * torch.pi)).round()
        return x + 2 * torch.pi * turns * axis
    return x


def misfit(kind: str, x: Tensor) -> str:
    """Why recorded numbers `[N, n]` are no rotations of this form, or ""."""
    if kind in QUATERNIONS:
        size = x.square().sum(-1).sqrt()
        worst = size[(size - 1).abs().argmax()]
        return f"a quaternion has the norm {float(worst):.3g} instead of 1" if abs(float(worst) - 1) > FAR else ""
    if kind in ("matrix", "6d_rows", "6d_columns"):
        found = from_matrix(kind, to_matrix(kind, x))
        off = float((found - x).abs().max())
        return f"a matrix is {off:.2g} away from a rotation" if off > FAR else ""
    beyond = float(x.abs().max())
    limit = 2 * torch.pi + FAR if kind == "axis_angle" else 4 * torch.pi
    return f"an angle is {beyond:.3g}; expected radians" if beyond > limit else ""


def _of_quaternion(x: Tensor) -> Tensor:
    """Quaternions xyzw `[..., 4]` of any length as matrices; one of length 0 as no rotation."""
    i, j, k, w = (x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=TINY)).unbind(-1)
    rows = [1 - 2 * (j * j + k * k), 2 * (i * j - k * w), 2 * (i * k + j * w)]
    rows += [2 * (i * j + k * w), 1 - 2 * (i * i + k * k), 2 * (j * k - i * w)]
    rows += [2 * (i * k - j * w), 2 * (j * k + i * w), 1 - 2 * (i * i + j * j)]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def _quaternion(m: Tensor) -> Tensor:
    """Matrices as quaternions xyzw with w >= 0, from the largest of their four numbers (Shepperd, 1978)."""
    a, b, c = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    x, y, z = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    squares = torch.stack([1 + a - b - c, 1 - a + b - c, 1 - a - b + c, 1 + a + b + c], -1)  # 4 times those of xyzw
    rows = [[squares[..., 0], xy, xz, x], [xy, squares[..., 1], yz, y], [xz, yz, squares[..., 2], z]]
    rows += [[x, y, z, squares[..., 3]]]
    all_four = torch.stack([torch.stack(row, -1) for row in rows], -2)  # [..., 4, 4], each a multiple of it
    largest = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    q = all_four.gather(-2, largest).squeeze(-2)
    q = q / q.square().sum(-1, keepdim=True).sqrt().clamp(min=TINY)
    return torch.where(q[..., 3:] < 0, -q, q)


def _about(axis: int, angle: Tensor) -> Tensor:
    """Rotations by `angle` `[...]` about one axis, `[..., 3, 3]`."""
    zero, one, cos, sin = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    places = {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos, (2, 2): one}
    order = ((axis + 1) % 3, (axis + 2) % 3, axis)
    found = {(order[i], order[j]): value for (i, j), value in places.items()}
    return torch.stack([found.get((i, j), zero) for i in range(3) for j in range(3)], -1).unflatten(-1, (3, 3))


def _euler(kind: str, m: Tensor) -> Tensor:
    """Euler angles of matrices; where only a sum of the outer two is determined, the last one is 0."""
    axes = ["xyz".index(axis.lower()) for axis in EULER[kind]]
    i, j, k = axes if kind[-1].isupper() else axes[::-1]  # m = R_i R_j R_k
    sign = 1 if (j - i) % 3 == 1 else -1
    cosine = (m[..., i, i].square() + m[..., i, j].square()).sqrt()
    first = torch.atan2(-sign * m[..., j, k], m[..., k, k])
    second = torch.atan2(sign * m[..., i, k], cosine)
    third = torch.atan2(-sign * m[..., i, j], m[..., i, i])
    locked = cosine < 1e-7
    first = torch.where(locked, torch.atan2(sign * m[..., k, j], m[..., j, j]), first)
    third = torch.where(locked, torch.zeros_like(third), third)
    angles = (first, second, third) if kind[-1].isupper() else (third, second, first)
    return torch.stack(angles, -1)
