"use strict";
(() => {
  const { sum, dot, logWeights, tilt, totalVariation, kl, PAD, TOP, START, GOAL, CURVE, DASH, THICK } = bookjs;
  const { scale, text, line, curve, svg, axes, below, point, key, control } = bookjs;

  // The number of ones among m fair bits; the reward is that number.
  function bits(m) {
    const log = [0];
    for (let k = 1; k <= m; k++) log.push(log[k - 1] + Math.log((m - k + 1) / k));
    return log.map((l) => Math.exp(l - m * Math.LN2));
  }
  // N -> total variation of soft best-of-N from the tilt, for any real N up to `largest`: the integral of numbers.js with
  // what does not depend on N tabulated once.
  function softDistance(p, r, beta, largest) {
    const h = 0.25, l = logWeights(r, beta), w = l.map(Math.exp), goal = tilt(p, r, beta), nodes = [];
    const end = Math.log(43) - Math.min(...l);
    for (let t = -Math.log(largest) - 38; t < end + h; t += h) {
      const s = Math.exp(t), gone = -dot(p, w.map((x) => Math.expm1(-s * x)));
      const logM = gone < 0.5 ? Math.log1p(-gone) : Math.log(dot(p, w.map((x) => Math.exp(-s * x))));
      nodes.push([logM, l.map((x, k) => h * p[k] * Math.exp(x + t - s * w[k]))]);
    }
    return (n) => {
      const law = p.map(() => 0);
      for (const [logM, row] of nodes) {
        const power = n * Math.exp((n - 1) * logM);
        if (power > 0) for (let k = 0; k < row.length; k++) law[k] += power * row[k];
      }
      return totalVariation(law, goal);
    };
  }
  // Below this no rule gets that returns one of n draws from p.
  const leastDistance = (p, goal, n) => sum(goal.map((g, k) => Math.max(0, g - n * p[k])));
  const normalTail = (z) => 0.5 - (z / 400) * sum(Array.from({ length: 400 },
    (_, i) => Math.exp(-0.5 * (((i + 0.5) * z) / 400) ** 2) / Math.sqrt(2 * Math.PI)));

  const count = (x) => { // 85, 3340, 1.2 million as a power of ten
    const e = Math.floor(Math.log10(x));
    return e < 5 ? `${x < 10 ? x.toFixed(1) : Math.round(x)}` : `${(x / 10 ** e).toFixed(1)}·10<sup>${e}</sup>`;
  };

  bookjs.explorable("length", (root, { m = 40, beta = 1 }) => {
    const lengths = [5, 10, 20, 40, 80, 160], betas = [0.32, 0.4, 0.5, 0.63, 0.8, 1, 1.3, 1.6, 2, 2.5, 3.2, 4];
    const getM = control(root, "m", "tokens", lengths, m), getBeta = control(root, "β", "temperature", betas, beta);
    const FAINT = 'stroke="currentColor" stroke-width="1.5" opacity="0.45"', DOTS = `${FAINT} stroke-dasharray="1 3"`;
    root.querySelector(".bk-key").innerHTML = key(line(0, 7, 26, 7, CURVE), "soft best-of-N")
      + key(line(0, 7, 26, 7, DOTS), "with 10 tokens") + key(line(0, 7, 26, 7, FAINT), "with 160") + key(DASH, "no rule gets below")
      + key(THICK, "Gaussian limit");
    return (width, height, panels) => {
      const M = getM(), b = getBeta(), one = tilt([0.5, 0.5], [0, 1], b), rate = kl(one, [0.5, 0.5]);
      const second = Math.log(2 * dot(one, one)), sd = Math.sqrt(one[0] * one[1]) / b, far = 2.2 * rate;
      const distance = (k) => softDistance(bits(k), [...Array(k + 1).keys()], b, Math.exp(2 * k * far));
      const tv = distance(M), p = bits(M), goal = tilt(p, [...p.keys()], b);
      const steps = [...Array(45).keys()].map((i) => (i / 44) * far);

      const x = scale(0, far, PAD, width - 4), y = scale(0, 1, height - PAD, TOP);
      const path = (k, f) => steps.map((u) => [x(u), y(f(Math.exp(k * u)))]);
      const mark = (u, name, style) => line(x(u), TOP + 16, x(u), y(0), style) + text(x(u), TOP + 11, name);
      panels[0].innerHTML = svg(width, height, "Total variation against log N per token",
        axes(width, height, "TV to the tilt") + below(width, height, "log N per token")
        + [0, 0.5, 1].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
        + [0, rate, far].map((u, i) => text(x(u), height - PAD + 16, +u.toPrecision(2), i === 2 ? "end" : "middle")).join("")
        + mark(rate, "KL", FAINT) + mark(second, "D₂", FAINT)
        + curve(path(10, distance(10)), DOTS) + curve(path(160, distance(160)), FAINT)
        + curve(path(M, (n) => leastDistance(p, goal, n)), START) + curve(path(M, tv), CURVE)
        + point([x(rate), y(tv(Math.exp(M * rate)))]));

      const at = scale(-3, 3, PAD, width - 4), zs = [...Array(49).keys()].map((i) => i / 8 - 3);
      const n = (z) => Math.exp(M * rate + z * sd * Math.sqrt(M)), possible = zs.filter((z) => n(z) >= 1);
      panels[1].innerHTML = svg(width, height, "Total variation against z", axes(width, height, "TV to the tilt")
        + below(width, height, "z = (log N − KL) / sd") + [0, 0.5, 1].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
        + [-2, 0, 2].map((z) => text(at(z), height - PAD + 16, String(z).replace("-", "−"))).join("")
        + curve(zs.map((z) => [at(z), y(normalTail(z))]), GOAL)
        + curve(possible.map((z) => [at(z), y(tv(n(z)))]), CURVE)
        + point([at(0), y(tv(n(0)))]));

      let low = 0, high = 2 * M * far; // log N for a tenth
      for (let i = 0; i < 30; i++) {
        const middle = (low + high) / 2;
        if (tv(Math.exp(middle)) > 0.1) low = middle; else high = middle;
      }
      return `TV ${tv(n(0)).toFixed(2)} at <i>e</i><sup>KL</sup> = ${count(n(0))} draws &emsp; a tenth takes ${count(Math.exp(high))},`
        + ` by the limit ${count(n(1.2816))}`;
    };
  });
  Object.assign(bookjs, { bits, softDistance, leastDistance, normalTail });
})();
