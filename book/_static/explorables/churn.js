"use strict";
(() => {
  const { sum, PAD, TOP, START, GOAL, CURVE, DASH, THICK } = bookjs;
  const { scale, text, line, curve, svg, axes, below, point, key, digits, control } = bookjs;

  // Guidance of scale g and noise factor c on the pair N(0, A) in N(0, B): the variance at the end, and the tilt's. In the
  // book's integral q = exp(-c^2 u) and u = e^t; the trapezoid rule in t, as above.
  function churnVariance(A, B, g, c) {
    if (c === 0) return A ** g * B ** (1 - g);
    const h = 0.25, end = Math.log(40 / c ** 2), power = (1 + c ** 2) * (g - 1);
    let v = 0;
    for (let t = -38 - Math.log(c ** 2); t < end + h; t += h) {
      const u = Math.exp(t);
      v += h * A * c ** 2 * Math.exp(t - c ** 2 * u + power * Math.log((A + (B - A) * Math.exp(-u)) / B));
    }
    return v;
  }
  const tiltVariance = (A, B, g) => 1 / (g / A + (1 - g) / B);
  const normal = (x, v) => Math.exp(-(x ** 2) / (2 * v)) / Math.sqrt(2 * Math.PI * v);
  function normalDistance(v, w) { // total variation of N(0, v) and N(0, w), by midpoints
    const far = 8 * Math.sqrt(Math.max(v, w)), n = 4000, x = Array.from({ length: n }, (_, i) => ((i + 0.5) / n) * far);
    return (sum(x.map((y) => Math.abs(normal(y, v) - normal(y, w)))) * far) / n;
  }

  bookjs.explorable("churn", (root, { A = 1, B = 2, g = 3, c = 1 }) => {
    const scales = [1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10];
    const churns = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.63, 0.8, 1, 1.3, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8, 10];
    const getG = control(root, "g", "scale", scales, g), getC = control(root, "ν", "churn", churns, c);
    const FAINT = 'stroke="currentColor" stroke-width="1.5" stroke-dasharray="1 3"';
    root.querySelector(".bk-key").innerHTML = key(line(0, 7, 26, 7, CURVE), "guided") + key(THICK, "tilt, the power law")
      + key(DASH, "conditional, <i>g</i> = 1") + key(line(0, 7, 26, 7, FAINT), "<i>p</i>");
    return (width, height, panels) => {
      const gNow = getG(), churn = getC(), v = churnVariance(A, B, gNow, churn), goal = tiltVariance(A, B, gNow);
      const laws = [[B, FAINT], [A, START], [goal, GOAL], [v, CURVE]];
      const far = 3 * Math.sqrt(B), peak = Math.max(...laws.map(([w]) => normal(0, w)));
      const x = scale(-far, far, PAD, width - 4), y = scale(0, peak, height - PAD, TOP + 4);
      const density = (w) => Array.from({ length: 161 }, (_, i) => far * (i / 80 - 1)).map((u) => [x(u), y(normal(u, w))]);
      panels[0].innerHTML = svg(width, height, "Densities", axes(width, height, "density") + below(width, height, "x")
        + [-4, -2, 0, 2, 4].map((u) => text(x(u), height - PAD + 16, String(u).replace("-", "−"))).join("")
        + laws.map(([w, style]) => curve(density(w), style)).join(""));

      // From 0 to infinity on one axis.
      const at = scale(0, 1, PAD, width - 16), up = scale(0, 1.15 * goal, height - PAD, TOP), on = (u) => at(u / (1 + u));
      const dial = Array.from({ length: 60 }, (_, i) => i / (60 - i)).map((u) => [on(u), up(churnVariance(A, B, gNow, u))]);
      panels[1].innerHTML = svg(width, height, "Variance against churn",
        axes(width, height, "variance") + below(width, height, "churn")
        + [0, 0.5, 1, 2, 5].map((u) => text(on(u), height - PAD + 16, u)).join("") + text(at(1), height - PAD + 16, "∞")
        + [0, goal].map((u) => text(PAD - 6, up(u) + 4, +u.toPrecision(2), "end")).join("")
        + line(PAD, up(goal), width - 16, up(goal), GOAL) + curve([...dial, [at(1), up(goal)]], CURVE) + point([on(churn), up(v)]));
      const tv = Math.round(normalDistance(v, goal) * 1e5) / 1e5; // at g = 1 there is only rounding
      const name = { 0: " (ODE)", 1: " (SDE)" }[churn] ?? "";
      return `variance ${v.toPrecision(4)}${name}, of the tilt ${goal.toPrecision(4)} &emsp; TV = ${digits(tv)}`;
    };
  });
  Object.assign(bookjs, { churnVariance, tiltVariance, normalDistance });
})();
