"""Whitening: features in which no direction outweighs the others.

Features vary far more along some directions than along others, the more so the shorter the pretraining. Distances then
tell of these directions alone. Whitening divides each principal component by its standard deviation (Jegou and Chum,
"Negative evidences and co-occurrences in image retrieval: the benefit of PCA and whitening", ECCV 2012), half
whitening by the root of that, which strengthens noise less. The images' labels play no part in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg

HALF, FULL = 0.5, 1.0  # How far to whiten: the power of the standard deviation that components are divided by.
# Added to each component's variance, as a share of their mean: a direction along which hardly anything varies is noise.
FLOOR = 0.1
_EMPTY = 1e-9  # A direction with no larger share of the mean variance is rounding.


class PrincipalComponents(NamedTuple):
    """The directions along which features vary.

    Attributes:
      mean: [D], of the features.
      axes: [D, R], of length 1, and zero where nothing varies.
      variances: [R], along the axes. Their mean is 1: lengths are relative to the features' own.
      length: the unit of lengths.
    """

    mean: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    length: float

    def whitened(self, features: np.ndarray, degree: float = HALF) -> np.ndarray:
        """The components [n, R] of `features` [n, D], whitened, float32.

        Args:
          features: of the same kind as those that the components were found from.
          degree: how far to whiten, from 0, not at all, to `FULL`.
        """
        return (features.astype(np.float32) - self.mean) @ self.whitening(degree)

    def whitening(self, degree: float = HALF) -> np.ndarray:
        """The matrix [D, R] that makes centred features whitened components, float32."""
        scales = (self.variances + FLOOR) ** (-degree / 2)  # [R]
        scales /= self.length * np.sqrt(np.mean(self.variances * scales**2) or 1.0)
        return self.axes * scales.astype(np.float32)


def principal_components(features: np.ndarray) -> PrincipalComponents:
    """The principal components of `features` [n, D], finite: R = min(n, D) of them."""
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = features.astype(np.float32) - mean
    few = len(centred) < centred.shape[1]
    if few:  # Then the features' products say the same as the dimensions' do, in less.
        centred = centred.astype(np.float64)  # Centring empties one direction, which rounding must not fill.
        products = centred @ centred.T  # [R, R]
    else:
        products = (centred.T @ centred).astype(np.float64)  # [R, R]
    energies, axes = linalg.eigh(products)  # [R], [R, R]
    energies = np.maximum(energies, 0.0)
    mean_energy = float(energies.mean()) or 1.0
    if few:
        filled = energies > _EMPTY * mean_energy
        axes = centred.T @ (axes * np.where(filled, 1 / np.sqrt(np.where(filled, energies, 1.0)), 0.0))  # [D, R]
    length = float(np.sqrt(mean_energy / len(features)))
    return PrincipalComponents(mean, axes.astype(np.float32), energies / mean_energy, length)
