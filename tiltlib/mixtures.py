"""Gaussian mixtures in closed form: density, score, draws, noise, posterior means, quadratic tilts, exact uniforms.

A law on vectors x of D numbers that stays one under everything a diffusion model does to it:

    p(x) = sum_k p_k N(x; m_k, S_k)    J components
    alpha x0 + sigma eps    has means alpha m_k and covariances alpha^2 S_k + sigma^2 I
    p(x) exp(r(x) / beta) / Z    is a mixture again if r(x) = -x'Ax / 2 + b'x

Every covariance is kept as S_k = U_k diag(v_k) U_k', decomposed once: noise changes the v_k only. Components may share
it, and it may be one number, one per coordinate, or have a basis. Densities and scores are matrix products; arrays of
n J D numbers appear only where each component has a basis of its own. The products expand |x - m|^2 around the centre
of the means, which costs a log density the digits of |m|^2 / v: errors of 1e-16 |m|^2 / v.

A mixture keeps its parameters in float64, whatever their dtype was, and returns the dtype that came in. At points in
float32 or half precision it computes in float32, with errors of 1e-7 |m|^2 / v, or in float64 where |m|^2 / v > 10^4.
Variances must lie between 1e-300 and 1e300. A component of probability 0 has no effect, wherever its mean is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tiltlib import _checks, _numerics, categorical

__all__ = ["GaussianMixture", "Tilted"]


class Tilted(NamedTuple):
    """What `GaussianMixture.tilt` returns.

    Attributes:
        mixture: The tilted law p(x) exp(r(x) / beta) / Z.
        log_partition: log Z, shape ().
    """

    mixture: "GaussianMixture"
    log_partition: Tensor


def _positive_definite(what: str, eigenvalues: Tensor, floor: Tensor) -> None:
    """Require eigenvalues above a floor, below which rounding alone could have made them positive."""
    lowest = eigenvalues.amin(-1)
    bad = lowest <= floor

    def error() -> ValueError:
        k = int(bad.long().argmax())
        return ValueError(f"{what}, got smallest eigenvalue {lowest[k].item():g} in component {k}")

    _checks.holds(~bad, error)


# With variances in this range and means within 1e150 of the smallest standard deviation, no table overflows in float64.
_SMALLEST, _LARGEST, _FARTHEST = 1e-300, 1e300, 1e150


def _normal_cdf(z: Tensor) -> Tensor:
    # torch.special.ndtr is 0 below -8.3; this keeps its digits as far as -37.
    return torch.special.erfc(z * -math.sqrt(0.5)) / 2


class GaussianMixture:
    """A mixture of J Gaussians in D dimensions.

        p(x) = sum_k exp(priors_k) N(x; m_k, S_k)

    It keeps copies of its arguments and gives out copies: nothing that a caller does to a tensor changes it. All that
    its methods compute is differentiable in the points and in the arguments; a matrix of equal eigenvalues has no
    gradient.

    Args:
        logps: Log-probabilities of the components, shape (J,), normalised; -inf switches one off.
        means: Their means, shape (J, D), floating.
        covariances: Variances, shape (J,) or (1,); one per coordinate, shape (J, D) or (1, D); or covariance matrices,
            shape (J, D, D) or (1, D, D). A leading 1 is shared by all components.

    Raises:
        TypeError: an argument that is not a floating tensor, or dtypes that differ.
        ValueError: `logps` not normalised, shapes that do not fit, numbers that are not finite, or a covariance that is
            not symmetric and positive definite (the message names the component); or variances outside of
            [1e-300, 1e300], or means farther apart than 1e150 of the smallest standard deviation.
    """

    def __init__(self, logps: Tensor, means: Tensor, covariances: Tensor) -> None:
        with _checks.together():
            _checks.logps("logps", logps)
            _checks.finite("means", means)
            _checks.finite("covariances", covariances)
            if not logps.dtype == means.dtype == covariances.dtype:
                dtypes = f"{logps.dtype}, {means.dtype}, {covariances.dtype}"
                raise TypeError(f"logps, means and covariances must have one dtype, got {dtypes}")
            j, d = means.shape if means.ndim == 2 else (0, 0)
            if d == 0 or logps.shape != (j,):
                raise ValueError(
                    f"means must have shape (J, D) and logps shape (J,), "
                    f"got {tuple(means.shape)} and {tuple(logps.shape)}"
                )
            if covariances.shape not in {(k, *rest) for k in (1, j) for rest in ((), (d,), (d, d))}:
                raise ValueError(
                    f"covariances must have shape ({j},), ({j}, {d}) or ({j}, {d}, {d}), or 1 in place of {j}, "
                    f"got {tuple(covariances.shape)}"
                )
            basis = None
            if covariances.ndim == 3:
                _checks.symmetric("covariances", covariances)
                spectrum, basis = torch.linalg.eigh(covariances.double())
                floor = d * torch.finfo(means.dtype).eps * spectrum.abs().amax(-1)
            else:
                spectrum = covariances.double().reshape(len(covariances), -1).clone()
                floor = torch.zeros_like(spectrum[:, 0])
            _positive_definite("covariances must be positive definite", spectrum, floor)
        # What a smaller dtype leaves of the sum is no error: it is normalised away.
        priors = logps.clone() if logps.dtype == torch.float64 else logps.double().log_softmax(-1)
        self._set(priors, means.double().clone(), spectrum, basis, means.dtype, "means and covariances")

    def _set(
        self,
        priors: Tensor,
        means: Tensor,
        spectrum: Tensor,
        basis: Tensor | None,
        dtype: torch.dtype,
        cause: str,
        extent: tuple[float, float, float] | None = None,
    ) -> None:
        """Keep S_k = U_k diag(v_k) U_k': spectrum of shape (1 or J, 1 or D), basis None or of shape (1 or J, D, D).

        `extent` is the smallest and the largest variance and the farthest coordinate of a mean from the middle, if they
        are known: to read them an accelerator has to be waited for.
        """
        self._priors, self._means, self._spectrum, self._dtype = priors, means, spectrum, dtype
        self.components, self.dimension = means.shape
        self._basis = None if self.dimension == 1 else basis
        self._alive = priors > -math.inf
        # Distances from the middle of the means: |x|^2 - 2 x'm + |m|^2 would cancel for data far from 0. A component of
        # probability 0 must not move the middle, and is put there itself: -inf plus an overflow would be NaN.
        alive = self._alive[:, None]
        centre = torch.where(alive, means, 0).sum(0) / alive.sum()
        centred = torch.where(alive, means - centre, 0)
        if extent is None:
            extent = tuple(torch.stack([*spectrum.detach().aminmax(), centred.detach().abs().amax()]).tolist())
        self._extent = smallest, largest, farthest = extent
        farthest /= math.sqrt(smallest) if smallest > 0 else 1.0
        if not (smallest >= _SMALLEST and largest <= _LARGEST and farthest <= _FARTHEST):
            raise ValueError(
                f"{cause} must give variances in [{_SMALLEST:g}, {_LARGEST:g}] and means within {_FARTHEST:g} of the "
                f"smallest standard deviation, got variances from {smallest:g} to {largest:g} and {farthest:g}"
            )
        # Float32 where it has digits and range to spare, which is twice as fast.
        single = dtype != torch.float64 and self.dimension * farthest**2 < 1e4 and smallest > 1e-8 and largest < 1e16
        self._work = torch.float32 if single else torch.float64
        # Points must not lie so far away that their squares overflow.
        self._reach = math.sqrt(torch.finfo(self._work).max / 64 / self.dimension) * min(1.0, math.sqrt(smallest))
        log_det = spectrum.log().expand(-1, self.dimension).sum(-1)
        log_norm = priors - (log_det + self.dimension * math.log(2 * math.pi)) / 2
        if self._own_bases():
            assert self._basis is not None
            # All bases side by side, each column over its standard deviation: (x - centre) @ table is (n, J D).
            whiten = self._basis / spectrum.sqrt()[:, None, :]
            table = whiten.movedim(0, 1).flatten(1)
            frame = (whiten.mT @ centred[..., None])[..., 0]
            bias = log_norm
        else:
            # log p_k N_k is linear in the coordinates z of x - centre and their squares (one sum of them if isotropic).
            frame = centred if self._basis is None else centred @ self._basis[0]
            slopes = frame / spectrum
            table = torch.cat([slopes, (-0.5 / spectrum).expand(len(means), -1)], -1)
            bias = log_norm - (slopes * frame).sum(-1) / 2
        self._centre, self._table, self._bias = (part.to(self._work) for part in (centre, table, bias))
        self._frame = frame

    @classmethod
    def _of(
        cls,
        priors: Tensor,
        means: Tensor,
        spectrum: Tensor,
        basis: Tensor | None,
        dtype: torch.dtype = torch.float64,
        cause: str = "parameters",
        extent: tuple[float, float, float] | None = None,
    ) -> "GaussianMixture":
        mixture = cls.__new__(cls)
        mixture._set(priors, means, spectrum, basis, dtype, cause, extent)
        return mixture

    def _own_bases(self) -> bool:
        return self._basis is not None and len(self._basis) > 1

    def _matrices(self, values: Tensor) -> Tensor:
        """Assemble U_k diag(values_k) U_k', shape (1 or J, D, D)."""
        if self._basis is None:
            return torch.diag_embed(values.expand(-1, self.dimension))
        return (self._basis * values[:, None, :]) @ self._basis.mT

    def _times(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Compute U_k diag(values_k) U_k' applied to vector k, for vectors of shape (..., J, D), in their dtype."""
        values = values.to(vectors.dtype)
        if self._basis is None:
            return values * vectors
        basis = self._basis.to(vectors.dtype)
        if not self._own_bases():
            return (vectors @ basis[0] * values) @ basis[0].mT
        turned = torch.einsum("...jd,jde->...je", vectors, basis) * values
        return torch.einsum("...je,jde->...jd", turned, basis)

    def to(self, dtype: torch.dtype) -> "GaussianMixture":
        """Take the same law for points of another dtype; what is kept inside does not change.

        Args:
            dtype: Floating dtype of the points.

        Returns:
            The mixture; itself if it has that dtype.

        Raises:
            TypeError: `dtype` is not a floating dtype.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
        if dtype == self._dtype:
            return self
        return self._of(self._priors, self._means, self._spectrum, self._basis, dtype)

    @property
    def prior_logps(self) -> Tensor:
        """Log-probabilities of the components, shape (J,)."""
        return self._priors.to(self._dtype, copy=True)

    @property
    def means(self) -> Tensor:
        """Means of the components, shape (J, D)."""
        return self._means.to(self._dtype, copy=True)

    @property
    def covariances(self) -> Tensor:
        """Covariance matrices of all components, shape (J, D, D)."""
        return self._matrices(self._spectrum).to(self._dtype).expand(self.components, -1, -1)

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, ridge: float) -> "GaussianMixture":
        """Fit one Gaussian with a full covariance to the points of each label.

            p_k = n_k / n,    m_k = mean of x,    S_k = mean of (x - m_k)(x - m_k)' + ridge I

        Args:
            x: Points, shape (n, D), floating.
            labels: Label of each point, integer tensor, shape (n,); 0..J-1, each of which occurs.
            ridge: Added to every variance, >= 0; must be > 0 where a class has no spread in some direction.

        Returns:
            The fitted mixture, for points of the dtype of `x`; computed in float64.

        Raises:
            TypeError: `x` not floating or `labels` not integer.
            ValueError: shapes that do not fit, a label without points, `ridge` < 0, or a singular covariance.
        """
        with _checks.together():
            _checks.finite("x", x)
            labels = _checks.integers("labels", labels)
            if x.ndim != 2 or labels.shape != x.shape[:1]:
                raise ValueError(
                    f"x must have shape (n, D) and labels shape (n,), got {tuple(x.shape)} and {tuple(labels.shape)}"
                )
            _checks.nonnegative("ridge", ridge)
            _checks.indices("labels", labels, len(x))
            ridge, points = float(ridge), x.double()
            counts = labels.bincount()
            _checks.holds(
                counts > 0,
                lambda: ValueError(
                    f"labels must use every number from 0 to {len(counts) - 1}, got no {int(counts.argmin())}"
                ),
            )
        groups = [points[labels == k] for k in range(len(counts))]
        eye = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
        covariances = [g.mT.cov(correction=0).reshape(eye.shape) + ridge * eye for g in groups]
        priors = (counts.double() / len(x)).log()
        return cls(priors, torch.stack([g.mean(0) for g in groups]), torch.stack(covariances)).to(x.dtype)

    # --- densities and scores ----------------------------------------------------------------------------------------

    def check_points(self, name: str, x: Tensor) -> None:
        """Require points that this mixture can take.

        Args:
            name: What to call the points in an error.
            x: Points, shape (n, D), in the dtype of the mixture.

        Raises:
            TypeError: `x` is not a floating tensor in the dtype of the mixture.
            ValueError: `x` not (n, D), not finite, or so far from the means that squares overflow.
        """
        if not isinstance(x, Tensor) or x.dtype != self._dtype:
            _checks.finite(name, x)
            raise TypeError(f"{name} must have the dtype of the mixture, {self._dtype}, got {x.dtype}")
        if x.ndim != 2 or x.shape[-1] != self.dimension:
            raise ValueError(f"{name} must have shape (n, {self.dimension}), got {tuple(x.shape)}")

        def error(low: float, high: float) -> ValueError:
            _checks.finite(name, x)
            return ValueError(
                f"{name} must lie within {self._reach:.3g} of the centre of the means, where squares do not overflow, "
                f"got {x.detach().abs().amax().item():.3g}"
            )

        # One pass for both: NaN lies within no distance.
        _checks.require(x.detach() - self._centre, -self._reach, self._reach, error)

    def _coordinates(self, x: Tensor) -> Tensor:
        """Write x - centre in the common basis, shape (n, D), or each x - m_k whitened, shape (n, J, D)."""
        z = x - self._centre  # in the dtype of the computation, which is the wider one
        if self._own_bases():
            whitened = torch.addmm(self._frame.flatten().to(self._work), z, self._table, beta=-1)
            return whitened.view(len(x), self.components, self.dimension)
        return z if self._basis is None else z @ self._basis[0].to(self._work)

    def _logits(self, z: Tensor, *, up_to_a_constant: bool = False) -> Tensor:
        """Compute log p_k N_k(x) from coordinates, shape (n, J); what all components share may be left out."""
        if self._own_bases():
            return self._bias - z.square().sum(-1) / 2
        if up_to_a_constant and len(self._spectrum) == 1:
            return torch.addmm(self._bias, z, self._table[:, : self.dimension].mT)
        squares = z.square() if self._spectrum.shape[1] > 1 else z.square().sum(-1, keepdim=True)
        return torch.addmm(self._bias, torch.cat([z, squares], -1), self._table.mT)

    def _pull(self, gain: Tensor | float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Make the function of x with values p(k | x) and sum_k p(k | x) U_k diag(gain_k / v_k) U_k' (m_k - x)."""
        scale = gain / self._spectrum
        turn = None if self._basis is None else self._basis[0].mT.to(self._work)
        # Tables of few columns: multiplying by them is several times faster if they are stored column by column.
        toward = (scale * self._frame).mT.to(self._work, memory_format=torch.contiguous_format)
        away = scale.mT.to(self._work, memory_format=torch.contiguous_format)
        gain = gain.to(self._work) if isinstance(gain, Tensor) else gain

        def pull(x: Tensor) -> tuple[Tensor, Tensor]:
            z = self._coordinates(x)
            shares = _numerics.flushed(self._logits(z, up_to_a_constant=True).softmax(-1))
            if self._own_bases():
                weight = -shares[..., None] if isinstance(gain, float) else -shares[..., None] * gain
                return shares, (weight * z).flatten(1) @ self._table.mT
            back = z * (away.mT if len(scale) == 1 else linear(shares, away))
            pulled = linear(shares, toward) - back
            return shares, pulled if turn is None else pulled @ turn

        return pull

    def _blockwise(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function to blocks of rows whose arrays fit in a cache of 1 MB: up to twice as fast. Round once.

        But no fewer at a time than it takes for the tables to be worth fetching from memory.
        """
        numbers, least = self.components, 128
        if self._own_bases():
            numbers, least = numbers * self.dimension, 32
        rows = max(least, 2**20 // (numbers * self._centre.element_size()))
        with _numerics.as_written(x.device):
            whole = torch.cat([compute(part) for part in x.split(rows)]) if len(x) > rows else compute(x)
        return whole.to(self._dtype)

    def component_logps(self, x: Tensor) -> Tensor:
        """Compute the joint log density of each component and the point.

            log p_k N(x; m_k, S_k)

        Args:
            x: Points, shape (n, D).

        Returns:
            Log densities, shape (n, J).
        """
        return self._joint(x).to(self._dtype)

    def _joint(self, x: Tensor) -> Tensor:
        self.check_points("x", x)
        with _numerics.as_written(x.device):
            return self._logits(self._coordinates(x))

    def logps(self, x: Tensor) -> Tensor:
        """Compute the log density.

            log p(x) = log sum_k p_k N(x; m_k, S_k)

        Args:
            x: Points, shape (n, D).

        Returns:
            Log densities, shape (n,).
        """
        return self._joint(x).logsumexp(-1).to(self._dtype)

    def posterior(self, x: Tensor) -> Tensor:
        """Compute which component a point came from.

            log p(k | x) = log p_k N(x; m_k, S_k) - log p(x)

        Args:
            x: Points, shape (n, D).

        Returns:
            Log-probabilities, shape (n, J), each row normalised.
        """
        return self._posterior("x", x).to(self._dtype)

    def _posterior(self, name: str, x: Tensor) -> Tensor:
        self.check_points(name, x)
        with _numerics.as_written(x.device):
            return self._logits(self._coordinates(x), up_to_a_constant=True).log_softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """Compute the gradient of the log density.

            grad log p(x) = sum_k p(k | x) S_k^-1 (m_k - x)

        Args:
            x: Points, shape (n, D).

        Returns:
            The gradient, shape (n, D).
        """
        self.check_points("x", x)
        pull = self._pull(1.0)
        return self._blockwise(lambda part: pull(part)[1], x)

    def _class_masks(self, classes: Tensor) -> list[Tensor]:
        classes = _checks.integers("classes", classes)

        def error(low: float, high: float) -> ValueError:
            return ValueError(
                f"classes must hold one number >= 0 for each of the {self.components} components, "
                f"got shape {tuple(classes.shape)} and smallest {int(low)}"
            )

        if classes.shape != (self.components,):
            raise error(int(classes.min()), 0)
        with _checks.together():
            _checks.require(classes, 0, math.inf, error)
            masks = [classes == c for c in range(max(int(classes.max()), 0) + 1)]
            used = torch.stack([(self._alive & mask).any() for mask in masks])
            _checks.holds(
                used,
                lambda: ValueError(
                    f"classes must each have positive probability, got 0 for class {int(used.long().argmin())}"
                ),
            )
        return masks

    def class_logps(self, x: Tensor, classes: Tensor) -> Tensor:
        """Compute the log-probability of each class of components given a point.

            log p(c | x) = log sum over k in c of p(k | x)

        Args:
            x: Points, shape (n, D).
            classes: Class of each component, integer tensor, shape (J,); 0..C-1, each of positive probability.

        Returns:
            Log-probabilities, shape (n, C), each row normalised.

        Raises:
            TypeError: `classes` is not an integer tensor.
            ValueError: `classes` of another shape, or a class of probability 0.
        """
        with _checks.together():
            masks = self._class_masks(classes)
            posterior = self._posterior("x", x)
            return torch.stack([posterior[:, mask].logsumexp(-1) for mask in masks], -1).to(self._dtype)

    def of_class(self, classes: Tensor, c: int) -> "GaussianMixture":
        """Condition on a class: the mixture of its components alone.

            p(x | c),    priors p_k / p(c)

        Args:
            classes: Class of each component, as for `class_logps`.
            c: The class, one of 0..C-1.

        Returns:
            The conditional mixture, of as many components as the class has.

        Raises:
            TypeError: `classes` is not an integer tensor.
            ValueError: as for `class_logps`, or `c` that is no class.
        """
        masks = self._class_masks(classes)
        if not 0 <= c < len(masks):
            raise ValueError(f"c must lie in 0..{len(masks) - 1}, got {c!r}")
        keep = masks[c]

        def own(part: Tensor) -> Tensor:
            return part[keep] if len(part) == self.components else part

        basis = None if self._basis is None else own(self._basis)
        priors = self._priors[keep].log_softmax(-1)
        return self._of(priors, self._means[keep], own(self._spectrum), basis, self._dtype)

    # --- draws and noise ---------------------------------------------------------------------------------------------

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw independent points: a component, then a Gaussian vector by inversion.

            x = m_k + S_k^(1/2) z,    z = inverse normal cdf of uniforms

        The root is the symmetric one. It does not depend on the basis that a processor finds, so neither do the draws.
        Differentiable in the means and covariances; the component is a constant.

        Args:
            n: Number of points, >= 1.
            generator: Source of randomness, on the device of the mixture.

        Returns:
            Points, shape (n, D); drawn in float64 and rounded once.

        Raises:
            TypeError: `n` is not an int, or `generator` is not a `torch.Generator`.
            ValueError: `n` < 1.
        """
        _checks.generator("generator", generator)
        with _checks.trusted():
            component = categorical.sample(self._priors, n, generator=generator)
        z = _numerics.normal(self._means.new_empty(n, self.dimension), generator)
        root = self._spectrum.sqrt()
        if self._basis is None:
            z = z * root.expand(self.components, -1)[component]
        else:
            roots = self._matrices(root)
            if len(roots) == 1:
                z = z @ roots[0]
            else:
                for k, matrix in enumerate(roots):
                    rows = component == k
                    z[rows] = z[rows] @ matrix
        return (self._means[component] + z).to(self._dtype)

    def noised(self, alpha: float, sigma: float) -> "GaussianMixture":
        """Shrink and add noise: the law of alpha x0 + sigma eps.

            means alpha m_k,    covariances alpha^2 S_k + sigma^2 I,    the same priors

        Args:
            alpha: Factor of the signal, > 0.
            sigma: Standard deviation of the noise, >= 0.

        Returns:
            The mixture of the noised points, with covariances of the same kind.

        Raises:
            TypeError: `alpha` or `sigma` is a tensor.
            ValueError: `alpha` not finite and > 0, `sigma` not finite and >= 0, or variances not in [1e-300, 1e300].
        """
        _checks.positive("alpha", alpha)
        _checks.nonnegative("sigma", sigma)
        alpha, sigma = float(alpha), float(sigma)
        cause = f"alpha = {alpha:g} and sigma = {sigma:g}"
        # Python raises at the square of a number above 1e154, where torch would go on with inf.
        shrunk, added = min(alpha, 1e154) ** 2, min(sigma, 1e154) ** 2
        smallest, largest, farthest = self._extent
        extent = smallest * shrunk + added, largest * shrunk + added, farthest * alpha
        spectrum = self._spectrum * shrunk + added
        return self._of(self._priors, self._means * alpha, spectrum, self._basis, self._dtype, cause, extent)

    def denoise(self, xt: Tensor, alpha: float, sigma: float) -> Tensor:
        """Compute the posterior mean of x0 given xt = alpha x0 + sigma eps (Tweedie's formula).

            E[x0 | xt] = (xt + sigma^2 grad log p_t(xt)) / alpha
                       = sum_k p(k | xt) (m_k + alpha S_k (alpha^2 S_k + sigma^2 I)^-1 (xt - alpha m_k))

        It is computed by the second line, which subtracts no large numbers.

        Args:
            xt: Noised points, shape (n, D).
            alpha: Factor of the signal, > 0.
            sigma: Standard deviation of the noise, >= 0.

        Returns:
            Posterior means, shape (n, D).

        Source: [efron2011]; book, `noised-mixture`.
        """
        noised = self.noised(alpha, sigma)
        noised.check_points("xt", xt)
        pull = noised._pull(float(alpha) * self._spectrum)
        columns = self._means.mT.to(noised._work, memory_format=torch.contiguous_format)

        def mean(part: Tensor) -> Tensor:
            shares, pulled = pull(part)
            return linear(shares, columns) - pulled

        return noised._blockwise(mean, xt)

    def denoise_covariance(self, xt: Tensor, alpha: float, sigma: float) -> Tensor:
        """Compute the posterior covariance of x0 given xt = alpha x0 + sigma eps.

            Cov[x0 | xt] = sum_k p(k | xt) (C_k + (d_k - D)(d_k - D)'),    D = sum_k p(k | xt) d_k
            C_k = sigma^2 S_k (alpha^2 S_k + sigma^2 I)^-1,    d_k = the posterior mean if x0 came from k

        It is sigma^2 / alpha times the derivative of `denoise`. Memory O(n (J D + D^2)).

        Args:
            xt: Noised points, shape (n, D).
            alpha: Factor of the signal, > 0.
            sigma: Standard deviation of the noise, >= 0.

        Returns:
            Posterior covariances, shape (n, D, D).

        Source: [efron2011]; book, `noised-mixture`.
        """
        noised = self.noised(alpha, sigma)
        shares, work = noised._posterior("xt", xt).exp(), noised._work
        ratio = self._spectrum / noised._spectrum
        offsets = xt[:, None] - noised._means.to(work)
        with _numerics.as_written(xt.device):
            if float(sigma) ** 2 < float(alpha) ** 2 * self._extent[0]:
                # All d_k are near xt / alpha, whose digits would hide their differences: xt / alpha - d_k.
                means = self._times(float(sigma) ** 2 / float(alpha) / noised._spectrum, offsets)
            else:
                means = self._means.to(work) + self._times(float(alpha) * ratio, offsets)
            spread = means - shares[:, None] @ means
            within = self._matrices(float(sigma) ** 2 * ratio).expand(self.components, -1, -1).to(work)
            between = (shares[..., None] * spread).mT @ spread
            return ((shares @ within.flatten(1)).view_as(between) + between).to(self._dtype)

    # --- tilts -------------------------------------------------------------------------------------------------------

    def tilt(self, quadratic: Tensor | None, linear: Tensor | None, beta: float) -> Tilted:
        """Tilt by a quadratic reward r(x) = -x'Ax / 2 + b'x.

            C_k = (S_k^-1 + A / beta)^-1,    g_k = (b - A m_k) / beta,    mean m_k + C_k g_k
            log z_k = r(m_k) / beta - (1/2) log det(I + S_k A / beta) + (1/2) g_k' C_k g_k
            log Z = log sum_k p_k z_k,    new priors p_k z_k / Z

        The tilt exists iff S_k^-1 + A / beta is positive definite for every component of positive weight. Without A
        the covariances stay as they are. Cost O(J D^3) with A.

        Args:
            quadratic: A, symmetric, shape (D, D); None is 0.
            linear: b, shape (D,); None is 0.
            beta: Temperature in reward units, > 0.

        Returns:
            `Tilted(mixture, log_partition)`.

        Raises:
            TypeError: `quadratic` or `linear` is not a floating tensor.
            ValueError: `quadratic` not symmetric, a shape that does not fit, `beta` not finite and > 0, a tilt that
                does not exist (the message names the component), or one outside of the range of float64.

        Source: book, `mixture-tilt`.
        """
        with _checks.together():
            _checks.positive("beta", beta)
            beta, d, alive = float(beta), self.dimension, self._alive[:, None]
            cause = f"quadratic, linear and beta = {beta:g}"
            for name, value, shape in (("quadratic", quadratic, (d, d)), ("linear", linear, (d,))):
                if value is not None:
                    _checks.finite(name, value)
                    if value.shape != shape:
                        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            # A component of probability 0 takes no part, wherever its mean is: its terms could overflow.
            means = torch.where(alive, self._means, 0)
            slope = torch.zeros_like(means[0]) if linear is None else linear.double() / beta
            if quadratic is None:
                tilted, common = self, means.new_zeros(())
                shift = self._times(self._spectrum, torch.where(alive, slope, 0))
                moved, log_z = self._means + shift, means @ slope + (shift * slope).sum(-1) / 2
            else:
                _checks.symmetric("quadratic", quadratic)
                curve = quadratic.double() / beta
                overflow = ValueError(f"{cause} must keep r / beta within the range of float64, got an overflow")
                _checks.holds(slope.isfinite().all() & curve.isfinite().all(), lambda: overflow)
                spectrum, basis = self._sharpened(curve)
                # For its covariances: the means may be out of range beside them.
                tilted = self._of(self._priors, torch.zeros_like(means), spectrum, basis, cause=cause)
                moved, log_z, common = self._log_gains(tilted, means, slope, curve)
            log_weights = torch.where(self._alive, self._priors + log_z, -math.inf)
            log_partition = common + log_weights.logsumexp(-1)
            _checks.holds(
                log_partition.isfinite(),
                lambda: ValueError(
                    f"{cause} must keep r / beta within the range of float64, got log Z = {log_partition:g}"
                ),
            )
            moved = torch.where(alive, moved, self._means)
            mixture = self._of(log_weights.log_softmax(-1), moved, tilted._spectrum, tilted._basis, self._dtype, cause)
            return Tilted(mixture, log_partition.to(self._dtype))

    def _log_gains(
        self, tilted: "GaussianMixture", means: Tensor, slope: Tensor, curve: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tilted means, log z_k - r(x) / beta, and r(x) / beta at x, the tilted mean of component j.

            mean x + C_k f_k,    f_k = S_k^-1 d_k - S_j^-1 d_j,    d_k = m_k - x
            log z_k = r(x) / beta - (1/2) d_k' S_k^-1 d_k + (1/2) f_k' C_k f_k - (1/2) log det(I + S_k A / beta)

        The square is completed at x, where (b - A x) / beta = -S_j^-1 d_j. Only r(x) / beta grows as beta falls.
        """
        pull = lambda vectors: self._times(1 / self._spectrum, vectors)  # noqa: E731
        spread = lambda vectors: tilted._times(tilted._spectrum, vectors)  # noqa: E731
        j = self._priors.argmax(keepdim=True)  # a tensor: as a number it would have to be read
        moved = spread(pull(means) + slope)
        # One step of refinement: C has the digits of its largest precision, x needs those of its own coordinates.
        moved = moved + spread(slope - moved @ curve - pull(moved - means))
        x = moved[j]
        d = means - x
        pulled = pull(d)
        f = pulled - pulled[j]
        log_det = (self._spectrum.log() - tilted._spectrum.log()).sum(-1)
        log_z = ((f * spread(f)).sum(-1) - (d * pulled).sum(-1) - log_det) / 2
        return x + spread(f), log_z, (x * (slope - x @ curve / 2)).sum()

    def _sharpened(self, curve: Tensor) -> tuple[Tensor, Tensor]:
        """Decompose (S_k^-1 + curve)^-1. A component of weight 0 stays as it is, whether or not its own tilt exists."""
        shared = len(self._spectrum) < self.components
        alive = torch.ones_like(self._spectrum[:, :1]) if shared else self._alive.double()[:, None]
        precision = 1 / self._spectrum
        # The norm of rows: that of squares would overflow.
        floor = alive[:, 0] * (precision.amax(-1) + curve.abs().sum(-1).amax())
        if self._basis is None and precision.shape[1] == 1:
            # Multiples of I have every eigenvector, so those of the curve serve all components.
            bends, vectors = torch.linalg.eigh(curve)
            precision, basis = precision + alive * bends, vectors[None]
        else:
            precision, basis = torch.linalg.eigh(self._matrices(precision) + alive[:, None] * curve)
        what = "quadratic must leave S_k^-1 + A / beta positive definite for every component of positive weight"
        _positive_definite(what, precision, self.dimension * torch.finfo(curve.dtype).eps * floor)
        return 1 / precision, basis

    # --- one dimension, moments, uniforms ----------------------------------------------------------------------------

    def project(self, direction: Tensor) -> "GaussianMixture":
        """Project on a line: the law of v'x.

            means v'm_k,    variances v'S_k v

        Args:
            direction: v, shape (D,), not 0.

        Returns:
            A mixture in one dimension.

        Raises:
            TypeError: `direction` is not a floating tensor.
            ValueError: `direction` of another shape, 0, or so small or large that variances leave [1e-300, 1e300].
        """
        with _checks.together():
            _checks.finite("direction", direction)
            some = (direction != 0).any()

            def error() -> ValueError:
                got = f"shape {tuple(direction.shape)}" if bool(some) else "only 0"
                return ValueError(f"direction must be a vector of {self.dimension} numbers, not all 0, got {got}")

            if direction.shape != (self.dimension,):
                raise error()
            _checks.holds(some, error)
            direction = direction.double()
            inner = direction[None] if self._basis is None else direction @ self._basis
            variances = (inner.square() * self._spectrum).sum(-1, keepdim=True)
            means = (self._means @ direction)[:, None]
            return self._of(self._priors, means, variances, None, self._dtype, "direction")

    def _line(self) -> None:
        if self.dimension != 1:
            raise ValueError(f"the mixture must have dimension 1, got {self.dimension}: project it first")

    def _cdf(self, x: Tensor) -> Tensor:
        standard = (x[..., None] - self._means[:, 0]) / self._spectrum[:, 0].sqrt()
        return (_normal_cdf(standard) * self._priors.exp()).sum(-1)

    def cdf(self, x: Tensor) -> Tensor:
        """Compute the cumulative distribution function in one dimension.

            P(X <= x) = sum_k p_k Phi((x - m_k) / s_k)

        Differentiable. Computed in float64.

        Args:
            x: Numbers, any shape.

        Returns:
            Probabilities, the shape and dtype of `x`.

        Raises:
            TypeError: `x` is not a floating tensor.
            ValueError: `x` not finite, or D > 1.
        """
        self._line()
        _checks.finite("x", x)
        return self._cdf(x.double()).to(x.dtype)

    @torch.no_grad()
    def quantile(self, u: Tensor) -> Tensor:
        """Invert `cdf` by bisection to the last bits.

            the x with P(X <= x) = u

        Not differentiable: the result carries no graph. Its derivative in u is 1 / p(x). Computed in float64.

        Args:
            u: Probabilities strictly between 0 and 1, any shape.

        Returns:
            Quantiles, the shape and dtype of `u`.

        Raises:
            TypeError: `u` is not a floating tensor.
            ValueError: `u` not strictly between 0 and 1, or D > 1.
        """
        self._line()
        with _checks.together():
            _checks.probabilities("u", u)
            end = (u == 0) | (u == 1)
            _checks.holds(~end, lambda: ValueError(f"u must lie strictly between 0 and 1, got {u[end][0].item():g}"))
        p = u.double()
        # The quantile of a mixture lies between the smallest and the largest quantile of its components.
        alive = self._alive
        scales = self._spectrum[:, 0].sqrt() if len(self._spectrum) == 1 else self._spectrum[alive, 0].sqrt()
        quantiles = self._means[alive, 0] + scales * torch.special.ndtri(p)[..., None]
        low, high = quantiles.amin(-1), quantiles.amax(-1)
        # Halve until the widest interval is one rounding of the narrowest component.
        smallest = torch.finfo(torch.float64).eps * scales.min()
        halvings = int(((high - low) / smallest).clamp(1, 1e300).log2().ceil().amax()) if p.numel() else 0
        for _ in range(halvings):
            middle = (low + high) / 2
            below = self._cdf(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(u.dtype)

    def uniforms(self, x: Tensor) -> Tensor:
        """Turn points into uniforms, one coordinate after the other (Rosenblatt's transform).

            u_1 = P(X_1 <= x_1),    u_d = P(X_d <= x_d | X_1 = x_1, ..., X_{d-1} = x_{d-1})

        Under this mixture the results are independent and uniform on [0, 1], exactly, so that any test of uniformity is
        a test of the law. Memory O(n J D).

        Args:
            x: Points, shape (n, D).

        Returns:
            Numbers in [0, 1], float64, shape (n, D).

        Source: [rosenblatt1952].
        """
        self.check_points("x", x)
        offsets = torch.where(self._alive[:, None], x[:, None].double() - self._means, 0)
        if self._basis is None:
            scales = self._spectrum.sqrt().expand(-1, self.dimension)
            z = offsets / scales
        else:
            # S = L L': the entries of L^-1 (x - m) are those of x, each standardised given the ones before it.
            factor = torch.linalg.cholesky(self._matrices(self._spectrum))
            scales = factor.diagonal(dim1=-2, dim2=-1)
            z = torch.linalg.solve_triangular(factor, offsets.movedim(0, -1), upper=False).movedim(-1, 0)
        steps = -z.square() / 2 - scales.log()
        # What the coordinates before d say about the component.
        before = self._priors[:, None] + pad(steps.cumsum(-1)[..., :-1], (1, 0))
        return (before.softmax(1) * _normal_cdf(z)).sum(1)

    def mean(self) -> Tensor:
        """Compute the mean of the mixture.

            E x = sum_k p_k m_k

        Returns:
            The mean, shape (D,).
        """
        return (self._priors.exp() @ self._means).to(self._dtype)

    def covariance(self) -> Tensor:
        """Compute the covariance of the mixture.

            Cov x = sum_k p_k (S_k + (m_k - E x)(m_k - E x)')

        Returns:
            The covariance, shape (D, D).
        """
        probs = self._priors.exp()
        spread = self._means - probs @ self._means
        within = self._matrices(self._spectrum).expand(self.components, -1, -1)
        total = (probs[:, None, None] * within).sum(0) + (probs[:, None] * spread).mT @ spread
        return total.to(self._dtype)
