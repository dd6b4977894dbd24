"""Gaussian mixtures in closed form: density, score, draws, noise, posterior means, quadratic tilts, exact uniforms.

A law on vectors x of D numbers that stays one under everything a diffusion model does to it:

    p(x) = sum_k p_k N(x; m_k, S_k)    J components
    alpha x0 + sigma eps    has means alpha m_k and covariances alpha^2 S_k + sigma^2 I
    p(x) exp(r(x) / beta) / Z    is a mixture again if r(x) = -x'Ax / 2 + b'x

Every covariance is kept as S_k = U_k diag(v_k) U_k', decomposed once: noise changes the v_k only. Components may share
it, and it may be one number, one per coordinate, or have a basis. Densities and scores are matrix products; arrays of
n J D numbers appear only where each component has a basis of its own. The products expand |x - m|^2 around the centre
of the means, which costs a log density the digits of |m|^2 / v: errors of 1e-16 |m|^2 / v in float64, 1e-7 in float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tiltlib import _checks, categorical

__all__ = ["GaussianMixture", "Tilted"]


class Tilted(NamedTuple):
    """What `GaussianMixture.tilt` returns.

    Attributes:
        mixture: The tilted law p(x) exp(r(x) / beta) / Z.
        log_partition: log Z, shape ().
    """

    mixture: "GaussianMixture"
    log_partition: Tensor


def _symmetric(name: str, matrices: Tensor) -> None:
    """Require symmetric matrices, up to half of the digits of the dtype."""
    gap = (matrices - matrices.mT).abs().amax((-2, -1))
    bad = gap > math.sqrt(torch.finfo(matrices.dtype).eps) * matrices.abs().amax((-2, -1))
    if bool(bad.any()):
        k = int(bad.long().argmax())
        where = f" in component {k}" if matrices.ndim == 3 else ""
        raise ValueError(f"{name} must be symmetric, got entries that differ by {gap.flatten()[k].item():g}{where}")


def _positive_definite(what: str, eigenvalues: Tensor, floor: Tensor) -> None:
    """Require eigenvalues above a floor, below which rounding alone could have made them positive."""
    lowest = eigenvalues.amin(-1)
    bad = lowest <= floor
    if bool(bad.any()):
        k = int(bad.long().argmax())
        raise ValueError(f"{what}, got smallest eigenvalue {lowest[k].item():g} in component {k}")


def _normal_cdf(z: Tensor) -> Tensor:
    # torch.special.ndtr is 0 below -8.3; this keeps its digits as far as -37.
    return torch.special.erfc(z * -math.sqrt(0.5)) / 2


class GaussianMixture:
    """A mixture of J Gaussians in D dimensions.

        p(x) = sum_k exp(priors_k) N(x; m_k, S_k)

    Args:
        logps: Log-probabilities of the components, shape (J,), normalised; -inf switches one off.
        means: Their means, shape (J, D), floating.
        covariances: Variances, shape (J,) or (1,); one per coordinate, shape (J, D) or (1, D); or covariance matrices,
            shape (J, D, D) or (1, D, D). A leading 1 is shared by all components.

    Raises:
        TypeError: an argument that is not a floating tensor, or dtypes that differ.
        ValueError: `logps` not normalised, shapes that do not fit, numbers that are not finite, or a covariance that is
            not symmetric and positive definite (the message names the component).
    """

    priors: Tensor
    means: Tensor

    def __init__(self, logps: Tensor, means: Tensor, covariances: Tensor) -> None:
        _checks.logps("logps", logps)
        _checks.finite("means", means)
        _checks.finite("covariances", covariances)
        if not logps.dtype == means.dtype == covariances.dtype:
            dtypes = f"{logps.dtype}, {means.dtype}, {covariances.dtype}"
            raise TypeError(f"logps, means and covariances must have one dtype, got {dtypes}")
        j, d = means.shape if means.ndim == 2 else (0, 0)
        if d == 0 or logps.shape != (j,):
            raise ValueError(
                f"means must have shape (J, D) and logps shape (J,), got {tuple(means.shape)} and {tuple(logps.shape)}"
            )
        if covariances.shape not in {(k, *rest) for k in (1, j) for rest in ((), (d,), (d, d))}:
            raise ValueError(
                f"covariances must have shape ({j},), ({j}, {d}) or ({j}, {d}, {d}), or 1 in place of {j}, "
                f"got {tuple(covariances.shape)}"
            )
        basis = None
        if covariances.ndim == 3:
            _symmetric("covariances", covariances)
            spectrum, basis = (part.to(means.dtype) for part in torch.linalg.eigh(covariances.double()))
            floor = d * torch.finfo(means.dtype).eps * spectrum.abs().amax(-1)
        else:
            spectrum = covariances.reshape(len(covariances), -1)
            floor = torch.zeros_like(spectrum[:, 0])
        _positive_definite("covariances must be positive definite", spectrum, floor)
        self._set(logps, means, spectrum, basis)

    def _set(self, priors: Tensor, means: Tensor, spectrum: Tensor, basis: Tensor | None) -> None:
        """Keep S_k = U_k diag(v_k) U_k': spectrum of shape (1 or J, 1 or D), basis None or of shape (1 or J, D, D)."""
        self.priors, self.means = priors, means
        self.components, self.dimension = means.shape
        self._spectrum = spectrum
        self._basis = None if self.dimension == 1 else basis
        # Distances from the middle of the means: |x|^2 - 2 x'm + |m|^2 would cancel for data far from 0.
        self._centre = means.mean(0)
        centred = means - self._centre
        log_det = spectrum.log().expand(-1, self.dimension).sum(-1)
        log_norm = priors - (log_det + self.dimension * math.log(2 * math.pi)) / 2
        if self._own_bases():
            assert self._basis is not None
            # All bases side by side, each column over its standard deviation: (x - centre) @ table is (n, J D).
            whiten = self._basis / spectrum.sqrt()[:, None, :]
            self._table = whiten.movedim(0, 1).flatten(1)
            self._frame = (whiten.mT @ centred[..., None])[..., 0]
            self._bias = log_norm
        else:
            # log p_k N_k is linear in the coordinates z of x - centre and their squares (one sum of them if isotropic).
            self._frame = centred if self._basis is None else centred @ self._basis[0]
            slopes = self._frame / spectrum
            self._table = torch.cat([slopes, (-0.5 / spectrum).expand(len(means), -1)], -1)
            self._bias = log_norm - (slopes * self._frame).sum(-1) / 2

    @classmethod
    def _of(cls, priors: Tensor, means: Tensor, spectrum: Tensor, basis: Tensor | None) -> "GaussianMixture":
        mixture = cls.__new__(cls)
        mixture._set(priors, means, spectrum, basis)
        return mixture

    def _own_bases(self) -> bool:
        return self._basis is not None and len(self._basis) > 1

    def _matrices(self, values: Tensor) -> Tensor:
        """Assemble U_k diag(values_k) U_k', shape (1 or J, D, D)."""
        if self._basis is None:
            return torch.diag_embed(values.expand(-1, self.dimension))
        return (self._basis * values[:, None, :]) @ self._basis.mT

    def _times(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Compute U_k diag(values_k) U_k' applied to vector k, for vectors of shape (..., J, D)."""
        if self._basis is None:
            return values * vectors
        if not self._own_bases():
            return (vectors @ self._basis[0] * values) @ self._basis[0].mT
        turned = torch.einsum("...jd,jde->...je", vectors, self._basis) * values
        return torch.einsum("...je,jde->...jd", turned, self._basis)

    def _double(self) -> "GaussianMixture":
        basis = None if self._basis is None else self._basis.double()
        return self._of(self.priors.double(), self.means.double(), self._spectrum.double(), basis)

    @property
    def covariances(self) -> Tensor:
        """Covariance matrices of all components, shape (J, D, D)."""
        return self._matrices(self._spectrum).expand(self.components, -1, -1)

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, ridge: float) -> "GaussianMixture":
        """Fit one Gaussian with a full covariance to the points of each label.

            p_k = n_k / n,    m_k = mean of x,    S_k = mean of (x - m_k)(x - m_k)' + ridge I

        Args:
            x: Points, shape (n, D), floating.
            labels: Label of each point, integer tensor, shape (n,); 0..J-1, each of which occurs.
            ridge: Added to every variance, >= 0; must be > 0 where a class has no spread in some direction.

        Returns:
            The fitted mixture, in the dtype of `x`.

        Raises:
            TypeError: `x` not floating or `labels` not integer.
            ValueError: shapes that do not fit, a label without points, `ridge` < 0, or a singular covariance.
        """
        _checks.finite("x", x)
        labels = _checks.integers("labels", labels)
        if x.ndim != 2 or labels.shape != x.shape[:1]:
            raise ValueError(
                f"x must have shape (n, D) and labels shape (n,), got {tuple(x.shape)} and {tuple(labels.shape)}"
            )
        _checks.nonnegative("ridge", ridge)
        _checks.indices("labels", labels, len(x))
        counts = labels.bincount()
        if bool((counts == 0).any()):
            raise ValueError(f"labels must use every number from 0 to {len(counts) - 1}, got no {int(counts.argmin())}")
        groups = [x[labels == k] for k in range(len(counts))]
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        covariances = [g.mT.cov(correction=0).reshape(eye.shape) + ridge * eye for g in groups]
        priors = (counts.to(x.dtype) / len(x)).log()
        return cls(priors, torch.stack([g.mean(0) for g in groups]), torch.stack(covariances))

    # --- densities and scores ----------------------------------------------------------------------------------------

    def _points(self, name: str, x: Tensor) -> None:
        _checks.finite(name, x)
        if x.dtype != self.means.dtype:
            raise TypeError(f"{name} must have the dtype of the mixture, {self.means.dtype}, got {x.dtype}")
        if x.ndim != 2 or x.shape[-1] != self.dimension:
            raise ValueError(f"{name} must have shape (n, {self.dimension}), got {tuple(x.shape)}")

    def _coordinates(self, x: Tensor) -> Tensor:
        """Write x - centre in the common basis, shape (n, D), or each x - m_k whitened, shape (n, J, D)."""
        z = x - self._centre
        if self._own_bases():
            return (z @ self._table).view(len(x), self.components, self.dimension) - self._frame
        return z if self._basis is None else z @ self._basis[0]

    def _logits(self, z: Tensor, *, up_to_a_constant: bool = False) -> Tensor:
        """Compute log p_k N_k(x) from coordinates, shape (n, J); what all components share may be left out."""
        if self._own_bases():
            return self._bias - z.square().sum(-1) / 2
        if up_to_a_constant and len(self._spectrum) == 1:
            return torch.addmm(self._bias, z, self._table[:, : self.dimension].mT)
        squares = z.square() if self._spectrum.shape[1] > 1 else z.square().sum(-1, keepdim=True)
        return torch.addmm(self._bias, torch.cat([z, squares], -1), self._table.mT)

    def _pull(self, gain: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Make the function of x with values p(k | x) and sum_k p(k | x) U_k diag(gain_k / v_k) U_k' (m_k - x)."""
        scale = gain / self._spectrum
        # Tables of few columns: multiplying by them is several times faster if they are stored column by column.
        toward, away = (scale * self._frame).mT.contiguous(), scale.mT.contiguous()

        def pull(x: Tensor) -> tuple[Tensor, Tensor]:
            z = self._coordinates(x)
            shares = self._logits(z, up_to_a_constant=True).softmax(-1)
            if self._own_bases():
                return shares, (-shares[..., None] * gain * z).flatten(1) @ self._table.mT
            back = z * (away.mT if len(scale) == 1 else linear(shares, away))
            pulled = linear(shares, toward) - back
            return shares, pulled if self._basis is None else pulled @ self._basis[0].mT

        return pull

    def _blockwise(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function to blocks of rows whose arrays fit in a cache of 1 MB: up to twice as fast."""
        numbers = self.components * (self.dimension if self._own_bases() else 1)
        rows = max(1, 2**20 // (numbers * x.element_size()))
        return torch.cat([compute(part) for part in x.split(rows)]) if len(x) > rows else compute(x)

    def component_logps(self, x: Tensor) -> Tensor:
        """Compute the joint log density of each component and the point.

            log p_k N(x; m_k, S_k)

        Args:
            x: Points, shape (n, D).

        Returns:
            Log densities, shape (n, J).
        """
        self._points("x", x)
        return self._logits(self._coordinates(x))

    def logps(self, x: Tensor) -> Tensor:
        """Compute the log density.

            log p(x) = log sum_k p_k N(x; m_k, S_k)

        Args:
            x: Points, shape (n, D).

        Returns:
            Log densities, shape (n,).
        """
        return self.component_logps(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """Compute which component a point came from.

            log p(k | x) = log p_k N(x; m_k, S_k) - log p(x)

        Args:
            x: Points, shape (n, D).

        Returns:
            Log-probabilities, shape (n, J), each row normalised.
        """
        self._points("x", x)
        return self._logits(self._coordinates(x), up_to_a_constant=True).log_softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """Compute the gradient of the log density.

            grad log p(x) = sum_k p(k | x) S_k^-1 (m_k - x)

        Args:
            x: Points, shape (n, D).

        Returns:
            The gradient, shape (n, D).
        """
        self._points("x", x)
        pull = self._pull(torch.ones_like(self._spectrum))
        return self._blockwise(lambda part: pull(part)[1], x)

    def _class_masks(self, classes: Tensor) -> list[Tensor]:
        classes = _checks.integers("classes", classes)
        if classes.shape != (self.components,) or int(classes.min()) < 0:
            raise ValueError(
                f"classes must hold one number >= 0 for each of the {self.components} components, "
                f"got shape {tuple(classes.shape)} and smallest {int(classes.min())}"
            )
        masks = [classes == c for c in range(int(classes.max()) + 1)]
        for c, mask in enumerate(masks):
            if not bool((self.priors[mask] > -math.inf).any()):
                raise ValueError(f"classes must each have positive probability, got 0 for class {c}")
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
        masks = self._class_masks(classes)
        posterior = self.posterior(x)
        return torch.stack([posterior[:, mask].logsumexp(-1) for mask in masks], -1)

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
        return self._of(self.priors[keep].log_softmax(-1), self.means[keep], own(self._spectrum), basis)

    # --- draws and noise ---------------------------------------------------------------------------------------------

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw independent points: a component, then a Gaussian vector by inversion.

            x = m_k + S_k^(1/2) z,    z = inverse normal cdf of uniforms

        The root is the symmetric one. It does not depend on the basis that a processor finds, so neither do the draws.

        Args:
            n: Number of points, >= 1.
            generator: Source of randomness, on the device of the mixture.

        Returns:
            Points, shape (n, D).
        """
        component = categorical.sample(self.priors, n, generator=generator)
        u = torch.rand(n, self.dimension, generator=generator, device=self.means.device, dtype=torch.float64)
        # A uniform of exactly 0 would be a point at infinity.
        z = torch.special.ndtri(u.clamp(min=2**-54)).to(self.means.dtype)
        root = self._spectrum.sqrt()
        if self._basis is None:
            z = z * root.expand(self.components, -1)[component]
        else:
            roots = self._matrices(root)
            for k, matrix in enumerate(roots):
                rows = component == k if len(roots) > 1 else slice(None)
                z[rows] = z[rows] @ matrix
        return self.means[component] + z

    def noised(self, alpha: float, sigma: float) -> "GaussianMixture":
        """Shrink and add noise: the law of alpha x0 + sigma eps.

            means alpha m_k,    covariances alpha^2 S_k + sigma^2 I,    the same priors

        Args:
            alpha: Factor of the signal, > 0.
            sigma: Standard deviation of the noise, >= 0.

        Returns:
            The mixture of the noised points, with covariances of the same kind.
        """
        _checks.positive("alpha", alpha)
        _checks.nonnegative("sigma", sigma)
        return self._of(self.priors, self.means * alpha, self._spectrum * alpha**2 + sigma**2, self._basis)

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

        Source: [efron2011]; book chapter 8, `noised-mixture`.
        """
        noised = self.noised(alpha, sigma)
        noised._points("xt", xt)

        pull = noised._pull(alpha * self._spectrum)
        columns = self.means.mT.contiguous()

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

        Source: [efron2011]; book chapter 8, `noised-mixture`.
        """
        noised = self.noised(alpha, sigma)
        shares = noised.posterior(xt).exp()
        ratio = self._spectrum / noised._spectrum
        means = self.means + self._times(alpha * ratio, xt[:, None] - noised.means)
        spread = means - shares[:, None] @ means
        within = self._matrices(sigma**2 * ratio).expand(self.components, -1, -1)
        between = (shares[..., None] * spread).mT @ spread
        return (shares @ within.flatten(1)).view_as(between) + between

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
            ValueError: `quadratic` not symmetric, a shape that does not fit, `beta` not finite and > 0, or a tilt that
                does not exist (the message names the component).

        Source: book chapter 8, `mixture-tilt`.
        """
        _checks.positive("beta", beta)
        law, d, dtype = self._double(), self.dimension, self.means.dtype
        for name, value, shape in (("quadratic", quadratic, (d, d)), ("linear", linear, (d,))):
            if value is not None:
                _checks.finite(name, value)
                if value.shape != shape:
                    raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        slope = torch.zeros_like(law.means[0]) if linear is None else linear.double() / beta
        reward, gradient = law.means @ slope, slope.expand_as(law.means)
        log_det, tilted = torch.zeros_like(reward), law
        if quadratic is not None:
            _symmetric("quadratic", quadratic)
            curve = quadratic.double() / beta
            bent = law.means @ curve
            reward, gradient = reward - (bent * law.means).sum(-1) / 2, gradient - bent
            spectrum, basis = law._sharpened(curve)
            log_det = (law._spectrum.log() - spectrum.log()).sum(-1)
            tilted = self._of(law.priors, law.means, spectrum, basis)
        shift = tilted._times(tilted._spectrum, gradient)
        log_weights = law.priors + reward - log_det / 2 + (gradient * shift).sum(-1) / 2
        mixture = self._of(
            log_weights.log_softmax(-1).to(dtype),
            (law.means + shift).to(dtype),
            tilted._spectrum.to(dtype),
            None if tilted._basis is None else tilted._basis.to(dtype),
        )
        return Tilted(mixture, log_weights.logsumexp(-1).to(dtype))

    def _sharpened(self, curve: Tensor) -> tuple[Tensor, Tensor]:
        """Decompose (S_k^-1 + curve)^-1. A component of weight 0 stays as it is, whether or not its own tilt exists."""
        shared = len(self._spectrum) < self.components
        alive = torch.ones_like(self._spectrum[:, :1]) if shared else (self.priors > -math.inf).double()[:, None]
        precision = 1 / self._spectrum
        floor = precision.amax(-1) + torch.linalg.matrix_norm(curve)
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
            ValueError: `direction` of another shape, or 0.
        """
        _checks.finite("direction", direction)
        if direction.shape != (self.dimension,) or not bool((direction != 0).any()):
            got = f"shape {tuple(direction.shape)}" if bool((direction != 0).any()) else "only 0"
            raise ValueError(f"direction must be a vector of {self.dimension} numbers, not all 0, got {got}")
        direction = direction.to(self.means.dtype)
        inner = direction[None] if self._basis is None else direction @ self._basis
        variances = (inner.square() * self._spectrum).sum(-1, keepdim=True)
        return self._of(self.priors, (self.means @ direction)[:, None], variances, None)

    def _line(self) -> None:
        if self.dimension != 1:
            raise ValueError(f"the mixture must have dimension 1, got {self.dimension}: project it first")

    def _cdf(self, x: Tensor) -> Tensor:
        standard = (x[..., None] - self.means[:, 0].double()) / self._spectrum[:, 0].double().sqrt()
        return (_normal_cdf(standard) * self.priors.double().exp()).sum(-1)

    def cdf(self, x: Tensor) -> Tensor:
        """Compute the cumulative distribution function in one dimension.

            P(X <= x) = sum_k p_k Phi((x - m_k) / s_k)

        Args:
            x: Numbers, any shape.

        Returns:
            Probabilities, the shape of `x`.

        Raises:
            TypeError: `x` is not a floating tensor.
            ValueError: `x` not finite, or D > 1.
        """
        self._line()
        _checks.finite("x", x)
        return self._cdf(x.double()).to(x.dtype)

    def quantile(self, u: Tensor) -> Tensor:
        """Invert `cdf` by bisection to the last bits.

            the x with P(X <= x) = u

        Args:
            u: Probabilities strictly between 0 and 1, any shape.

        Returns:
            Quantiles, the shape of `u`.

        Raises:
            TypeError: `u` is not a floating tensor.
            ValueError: `u` not strictly between 0 and 1, or D > 1.
        """
        self._line()
        _checks.probabilities("u", u)
        ends = u[(u == 0) | (u == 1)]
        if len(ends):
            raise ValueError(f"u must lie strictly between 0 and 1, got {ends[0].item():g}")
        p = u.double()
        # The quantile of a mixture lies between the smallest and the largest quantile of its components.
        scales = self._spectrum[:, 0].double().sqrt()
        quantiles = self.means[:, 0].double() + scales * torch.special.ndtri(p)[..., None]
        low, high = quantiles.amin(-1), quantiles.amax(-1)
        # Halve until the widest interval is one rounding of the narrowest component.
        smallest = torch.finfo(torch.float64).eps * scales.min()
        halvings = int(((high - low) / smallest).clamp(min=1).log2().ceil().amax()) if p.numel() else 0
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
        self._points("x", x)
        offsets = x[:, None].double() - self.means.double()
        if self._basis is None:
            scales = self._spectrum.double().sqrt().expand(-1, self.dimension)
            z = offsets / scales
        else:
            # S = L L': the entries of L^-1 (x - m) are those of x, each standardised given the ones before it.
            law = self._double()
            factor = torch.linalg.cholesky(law._matrices(law._spectrum))
            scales = factor.diagonal(dim1=-2, dim2=-1)
            z = torch.linalg.solve_triangular(factor, offsets.movedim(0, -1), upper=False).movedim(-1, 0)
        steps = -z.square() / 2 - scales.log()
        # What the coordinates before d say about the component.
        before = self.priors.double()[:, None] + pad(steps.cumsum(-1)[..., :-1], (1, 0))
        return (before.softmax(1) * _normal_cdf(z)).sum(1)

    def mean(self) -> Tensor:
        """Compute the mean of the mixture.

            E x = sum_k p_k m_k

        Returns:
            The mean, shape (D,).
        """
        return self.priors.exp() @ self.means

    def covariance(self) -> Tensor:
        """Compute the covariance of the mixture.

            Cov x = sum_k p_k (S_k + (m_k - E x)(m_k - E x)')

        Returns:
            The covariance, shape (D, D).
        """
        probs = self.priors.exp()
        spread = self.means - self.mean()
        return (probs[:, None, None] * self.covariances).sum(0) + (probs[:, None] * spread).mT @ spread
