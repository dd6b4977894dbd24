"use strict";
// Laws and distances on finitely many outcomes, for the explorables. Arrays in, arrays out; a browser test compares each with
// tiltlib. What one explorable alone computes stands in its own file.
window.bookjs = (() => {
  const sum = (x) => x.reduce((a, b) => a + b, 0);
  const dot = (x, y) => sum(x.map((a, k) => a * y[k]));

  const logWeights = (r, beta) => r.map((x) => (x - Math.max(...r)) / beta); // largest 0: no overflow
  function tilt(p, r, beta) {
    const mass = logWeights(r, beta).map((l, k) => p[k] * Math.exp(l));
    return mass.map((m) => m / sum(mass));
  }
  // P_N(y) = N p w int e^{-s w} M(s)^{N-1} ds with M(s) = E_p e^{-s w}. With s = e^t the trapezoid rule of step 1/4 has
  // relative error 1e-15 for every N, p and r; the ends of the sum leave out no more.
  function softBestOfN(p, r, n, beta) {
    if (n === 1) return [...p];
    const h = 0.25, l = logWeights(r, beta), w = l.map(Math.exp), law = p.map(() => 0);
    const end = Math.log(43) - Math.min(...l);
    for (let t = -Math.log(n) - 38; t < end + h; t += h) {
      const s = Math.exp(t);
      // Where M is 1 minus a little, the little alone keeps its digits, which the power N - 1 needs.
      const gone = -dot(p, w.map((x) => Math.expm1(-s * x)));
      const logM = gone < 0.5 ? Math.log1p(-gone) : Math.log(dot(p, w.map((x) => Math.exp(-s * x))));
      p.forEach((q, k) => { law[k] += h * n * q * Math.exp(l[k] + t - s * w[k] + (n - 1) * logM); });
    }
    return law;
  }
  // X_N(y) = N p w int_0^{1/w} u^{N-1} dv with u(v) = E_p (1 - w v)_+, which is linear between the numbers 1/w.
  function exponentialBestOfN(p, r, n, beta) {
    const l = logWeights(r, beta), w = l.map(Math.exp);
    const logU = (v) => { // from whichever side is nearer: the power N needs the digits of 1 - u near 1
      const gone = sum(p.map((q, k) => q * Math.min(1, w[k] * v)));
      return gone < 0.5 ? Math.log1p(-gone) : Math.log(sum(p.map((q, k) => q * Math.max(0, 1 - w[k] * v))));
    };
    const ends = [...new Set(w)].sort((a, b) => b - a).map((x) => [1 / x, sum(p.map((q, k) => (w[k] <= x ? q * w[k] : 0)))]);
    let from = 0, total = 0; // N int_0^v u^{N-1}, segment by segment
    const upTo = new Map(ends.map(([v, slope]) => {
      const a = logU(from);
      if (slope > 0) total += (Math.exp(n * a) * -Math.expm1(n * (logU(v) - a))) / slope;
      from = v;
      return [v, total];
    }));
    return p.map((q, k) => (q > 0 ? q * w[k] * upTo.get(1 / w[k]) : 0));
  }
  function bestOfN(p, r, n) { // ties broken over draws
    const mass = (test) => sum(p.map((q, k) => (test(r[k]) ? q : 0)));
    return p.map((q, k) => {
      const below = mass((x) => x < r[k]), level = mass((x) => x === r[k]);
      return q > 0 ? (q / level) * ((below + level) ** n - below ** n) : 0;
    });
  }
  const totalVariation = (a, b) => sum(a.map((x, k) => Math.abs(x - b[k]))) / 2;
  // sum a log(a/b) = sum a (d - log(1 + d)) with d = b/a - 1, as sum a d = 0: exact also where a is nearly b.
  const kl = (a, b) => sum(a.map((x, k) => (x > 0 ? x * (b[k] / x - 1 - Math.log1p(b[k] / x - 1)) : b[k])));

  return { sum, dot, logWeights, tilt, softBestOfN, exponentialBestOfN, bestOfN, totalVariation, kl };
})();
