"use strict";
(() => {
  const { sum, BLUE, ORANGE, PAD, TOP, START } = bookjs;
  const { scale, text, line, power, curve, svg, axes, below, point, key, bar, control, decades } = bookjs;
  const LEVEL = 1e-8, GRID = [-3, -2, -1, 0, 1, 2, 3, 4].map((i) => 4 ** i); // concentrations in units of n

  // Stirling's series, which is exact to rounding from 16 on.
  function logGamma(x) {
    let below16 = 0;
    for (; x < 16; x += 1) below16 += Math.log(x);
    const y = 1 / (x * x), rest = (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y / 1188)))) / x;
    return (x - 0.5) * Math.log(x) - x + Math.log(2 * Math.PI) / 2 + rest - below16;
  }
  function logMean(x) {
    const most = Math.max(...x);
    return most === -Infinity ? most : most + Math.log(sum(x.map((v) => Math.exp(v - most))) / x.length);
  }
  // log E of counts against the law p, as tiltlib.verify computes it: the Dirichlet mixture and, if there are declared
  // wrong laws, their likelihood ratios, half and half.
  function logEvidence(counts, p, declared = []) {
    const n = sum(counts), seen = [...counts.keys()].filter((y) => counts[y] > 0);
    if (seen.some((y) => p[y] === 0)) return Infinity;
    const share = (k, y) => logGamma(k * p[y] + counts[y]) - logGamma(k * p[y]) - counts[y] * Math.log(p[y]);
    const mixed = (k) => logGamma(k) - logGamma(k + n) + sum(seen.map((y) => share(k, y)));
    const blind = logMean(GRID.map((g) => mixed(g * n)));
    const ratios = declared.map((q) => sum(seen.map((y) => counts[y] * Math.log(q[y] / p[y]))));
    return declared.length ? logMean([blind, logMean(ratios)]) : blind;
  }
  // How many draws of q are enough, but for a chance of 1e-8, when q was declared: the least over s of the theorem's bound.
  function plannedDraws(p, q) {
    const draws = (s) => -Math.log(LEVEL) + s * Math.log(2 / LEVEL);
    const enough = (s) => draws(s) / -Math.log(sum(p.map((v, y) => v ** s * q[y] ** (1 - s))));
    let low = 0, high = 1;
    while (high - low > 1e-9) {
      const third = (high - low) / 3;
      if (enough(low + third) < enough(high - third)) high -= third; else low += third;
    }
    return Math.ceil(enough((low + high) / 2));
  }
  // Uniform numbers from a seed (mulberry32), so that everyone sees the same draws.
  function uniforms(seed, n) {
    let state = seed;
    return Float64Array.from({ length: n }, () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    });
  }
  // Counts of the outcomes of a law after the first `sizes` numbers.
  function countsAt(sizes, law, numbers) {
    const counts = law.map(() => 0), ends = law.map((_, y) => sum(law.slice(0, y + 1)));
    let drawn = 0;
    return sizes.map((n) => {
      for (; drawn < n; drawn++) {
        let y = 0;
        while (y < law.length - 1 && numbers[drawn] >= ends[y]) y++;
        counts[y]++;
      }
      return [...counts];
    });
  }

  bookjs.explorable("evidence", (root, { K = 8, mistake = 5, n = 2000 }) => {
    const sizes = decades(2, 5.3), p = Array(K).fill(1 / K);
    const getN = control(root, "n", "draws", sizes, n);
    const getMistake = control(root, "%", "mistake of B", [2.5, 3.5, 5, 7, 10, 14, 20], mistake);
    const getSample = control(root, "no.", "sample", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 1);
    const A = `stroke="${BLUE}" stroke-width="2.5"`, B = `stroke="${ORANGE}" stroke-width="2.5"`;
    const UNDECLARED = `${B} stroke-dasharray="2 4"`;
    root.querySelector(".bk-key").innerHTML = key(bar(`fill="${BLUE}"`), "A") + key(bar(`fill="${ORANGE}"`), "B")
      + key(line(0, 7, 26, 7, UNDECLARED), "B, nothing declared") + key(line(0, 7, 26, 7, START), "dashed: the claim (left), rejection (right)");
    const last = sizes[sizes.length - 1];
    return (width, height, panels) => {
      const now = getN(), off = getMistake() / 100, sample = getSample();
      const q = p.map((v, y) => v * (y % 2 ? 1 - off : 1 + off)), plan = plannedDraws(p, q);
      const right = countsAt(sizes, p, uniforms(2 * sample, last)), wrong = countsAt(sizes, q, uniforms(2 * sample + 1, last));
      const at = sizes.indexOf(now), runs = [right[at], wrong[at]];

      const step = (width - PAD - 4) / K, h = scale(0, 2 / K, height - PAD, TOP), middle = (y) => PAD + step * (y + 0.5);
      const one = (counts, i) => counts.map((c, y) => `<rect x="${middle(y) - step * 0.4 + i * step * 0.4}" width="${step * 0.38}"
        y="${h(Math.min(2 / K, c / now))}" height="${h(0) - h(Math.min(2 / K, c / now))}" fill="${[BLUE, ORANGE][i]}"/>`).join("");
      panels[0].innerHTML = svg(width, height, "Share of each outcome among the draws",
        axes(width, height, "share of the draws") + below(width, height, "outcome") + runs.map(one).join("")
        + p.map((_, y) => text(middle(y), height - PAD + 16, y + 1)).join("") + line(PAD, h(1 / K), width - 4, h(1 / K), START)
        + text(PAD - 4, h(1 / K) + 4, `1/${K}`, "end") + text(PAD - 4, h(0) + 4, 0, "end"));

      const x = scale(2, Math.log10(last), PAD, width - 10), y = scale(-4, 24, height - PAD, TOP), ten = Math.log(10);
      const place = (m, v) => [x(Math.log10(m)), y(Math.min(24, Math.max(-4, v)))];
      const told = [[right, [q], A], [wrong, [], UNDECLARED], [wrong, [q], B]].map(([counts, declared, style]) =>
        [counts.map((c) => logEvidence(c, p, declared) / ten), style]);
      const path = ([values, style]) => { // beyond the picture it stops
        const end = values.findIndex((v) => v >= 24) + 1 || sizes.length;
        return curve(sizes.slice(0, end).map((m, i) => place(m, values[i])), style);
      };
      const there = plan <= last ? line(x(Math.log10(plan)), y(-4), x(Math.log10(plan)), y(24), 'stroke="currentColor" opacity="0.5"')
        + text(x(Math.log10(plan)) - 4, y(3.5), "planned", "end") : "";
      panels[1].innerHTML = svg(width, height, "Evidence against the even law, in powers of ten, against the number of draws",
        axes(width, height, "evidence E") + below(width, height, "n")
        + [2, 3, 4, 5].map((e) => text(x(e), height - PAD + 16, power(e))).join("")
        + [0, 8, 16].map((e) => text(PAD - 6, y(e) + 4, power(e), "end")).join("")
        + line(PAD, y(8), width - 10, y(8), START) + there + told.map(path).join("")
        + told.map(([values, style]) => point(place(now, values[at]), style)).join(""));
      const say = (i) => `10<sup>${told[i][0][at].toFixed(1).replace("-", "−")}</sup>`;
      return `<i>n</i> = ${now}: <i>E</i> = ${say(0)} for A, ${say(2)} for B, ${say(1)} with nothing declared &emsp; `
        + `planned for B: ${plan} draws`;
    };
  });
  Object.assign(bookjs, { logEvidence, plannedDraws, uniforms, countsAt });
})();
