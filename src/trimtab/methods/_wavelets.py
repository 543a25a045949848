"""The low-pass filters of orthogonal wavelets: Daubechies and symlets from the roots of a polynomial, coiflets by heart.

A filter of order N is (1 + z)^N times N - 1 roots z_k, normalised to the sum sqrt(2). With y = (2 - z - 1 / z) / 4, each
root y of sum_k C(N - 1 + k, k) y^k, k < N, leaves a choice: z inside the unit circle or 1 / z outside. Daubechies takes
all inside, symlets the choice that is most symmetric.                       Daubechies, Ten Lectures on Wavelets, ch. 6, 8
"""

from __future__ import annotations

import cmath
import math
from functools import lru_cache

import torch
from torch import Tensor

_DAUBECHIES = 34  # beyond this order, doubles lose the filter
_SYMLETS = {2: 0, 3: 0, 4: 2, 5: 1, 6: 5, 7: 1, 8: 10, 9: 6, 10: 21}  # by order, a bit for each root outside, by |z|
_COIFLETS = {
    "coif1": """-0.07273261951252645 0.33789766245748176 0.8525720202116004 0.3848648468648577 -0.07273261951252645
        -0.015655728135791993""",
    "coif2": """0.01638733646320364 -0.04146493678687178 -0.0673725547237256 0.38611006682276283 0.8127236354494135
        0.41700518442323903 -0.07648859907828075 -0.059434418646431085 0.023680171946847767 0.005611434819368834
        -0.0018232088709110319 -0.000720549445520347""",
    "coif3": """-0.0037935128643808128 0.007782596425672765 0.023452696142077224 -0.06577191128146948
        -0.06112339000297264 0.40517690240911847 0.7937772226260873 0.4284834763773696 -0.0717998216191548
        -0.08230192710629956 0.03455502757329765 0.015880544863669358 -0.009007976136730576 -0.002574517688136783
        0.0011175187708306203 0.00046621695982040207 -7.098330250637906e-05 -3.4599773197272306e-05""",
}
NAMES = [*(f"db{n}" for n in range(1, _DAUBECHIES + 1)), *(f"sym{n}" for n in _SYMLETS), *_COIFLETS]


@lru_cache(maxsize=len(NAMES))
def low_pass(name: str) -> Tensor:
    """The reconstruction filter (length) in double precision."""
    if name in _COIFLETS:
        return torch.tensor([float(c) for c in _COIFLETS[name].split()], dtype=torch.float64)
    order, outside = int(name.lstrip("dbsym")), _SYMLETS[int(name[3:])] if name.startswith("sym") else 0
    filter = torch.ones(1, dtype=torch.complex128)
    pairs = sorted((z for z in _roots(order) if z.imag > -1e-9), key=lambda z: (round(abs(z), 9), z.real))
    chosen = [1 / z if outside >> i & 1 else z for i, z in enumerate(pairs)]
    for z in [*chosen, *(z.conjugate() for z in chosen if abs(z.imag) > 1e-9), *[-1] * order]:
        filter = torch.nn.functional.pad(filter, (0, 1)) - z * torch.nn.functional.pad(filter, (1, 0))
    return filter.real * (2**0.5 / filter.real.sum())


def _roots(order: int) -> list[complex]:
    """The N - 1 roots z inside the unit circle."""
    c = [math.comb(order - 1 + k, k) for k in range(order)]
    companion = torch.diag(torch.ones(max(order - 2, 0), dtype=torch.float64), -1)[: order - 1, : order - 1]
    companion[:1] = torch.tensor([-a / c[-1] for a in c[-2::-1]], dtype=torch.float64)
    found = []
    for y in torch.linalg.eigvals(companion).tolist() if order > 1 else []:
        for _ in range(3):  # Newton: eigenvalues are right to eight digits or so
            y -= sum(a * y**k for k, a in enumerate(c)) / sum(k * a * y ** (k - 1) for k, a in enumerate(c) if k)
        z = 1 - 2 * y + cmath.sqrt((1 - 2 * y) ** 2 - 1)
        found.append(z if abs(z) < 1 else 1 / z)
    return found
