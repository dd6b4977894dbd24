"use strict";
(() => {
  const { tilt, softBestOfN, exponentialBestOfN, bestOfN, totalVariation, kl } = bookjs;
  const { GREEN, PAD, TOP, START, GOAL, CURVE, SOFT, NOISE, HARD, DASH, THICK } = bookjs;
  const { scale, text, power, curve, svg, axes, below, point, bars, key, bar, rounded, control, decades } = bookjs;

  bookjs.explorable("soft-best-of-n", (root, { p = [0.5, 0.3, 0.2], rewards: r = [0, 1, 2], n = 16, beta = 1 }) => {
    const sizes = [...new Set(decades(0, 4).map(Math.round))], betas = [0.05, 0.063, 0.08, ...decades(-1, 1)];
    const getN = control(root, "N", "candidates", sizes, n), getBeta = control(root, "β", "temperature", betas, beta);
    root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "soft") + key(bar(NOISE), "exponential noise")
      + key(bar(HARD), "best") + key(DASH, "<i>p</i>, the reference") + key(THICK, "<i>π*</i>, the tilt");
    const rules = [ // name, law, fill of a bar, line of a curve, and where its name stands: index of a size, below or above
      ["soft", (m, b) => softBestOfN(p, r, m, b), SOFT, CURVE, 20, -6],
      ["noise", (m, b) => exponentialBestOfN(p, r, m, b), NOISE, `stroke="${GREEN}" stroke-width="2.5"`, 8, 14],
      ["best", (m) => bestOfN(p, r, m), HARD, 'stroke="#999999" stroke-width="2.5"', 24, -8],
    ];
    return (width, height, panels) => {
      const N = getN(), b = getBeta(), goal = tilt(p, r, b), laws = rules.map(([, law]) => law(N, b));
      panels[0].innerHTML = bars(width, height, "Probability of each outcome", laws, rules.map((rule) => rule[2]), p, goal, r);

      const low = 1e-6, x = scale(0, 4, PAD, width - 16), y = scale(0, Math.log10(low), TOP, height - PAD);
      const at = (m, v) => [x(Math.log10(m)), y(Math.log10(Math.min(1, Math.max(low, v))))];
      const one = ([name, law, , style, where, lift]) => {
        const path = sizes.map((m) => at(m, totalVariation(law(m, b), goal))), [u, v] = path[where];
        const end = path.findIndex((q) => q[1] >= height - PAD) + 1 || path.length; // below the picture it stops
        const there = v < height - PAD - 20 ? text(u + (lift < 0 ? 4 : -8), v + lift, name, lift < 0 ? "start" : "end") : "";
        return curve(path.slice(0, end), style) + there + point(at(N, totalVariation(law(N, b), goal)), style);
      };
      panels[1].innerHTML = svg(width, height, "Total variation of each rule from the tilt, against N",
        axes(width, height, "TV to the tilt") + below(width, height, "N")
        + [0, 2, 4].map((e) => text(x(e), height - PAD + 16, power(e))).join("")
        + [0, -2, -4, -6].map((e) => text(PAD - 6, y(e) + 4, power(e), "end")).join("") + rules.map(one).join(""));
      const say = (several, measure) => several.map((law, i) => `${rules[i][0]} ${rounded(measure(law))}`).join(", ");
      return `TV to <i>π*</i>: ${say(laws, (law) => totalVariation(law, goal))} &emsp; `
        + `KL(<i>π*</i> ‖ law): ${say(laws.slice(0, 2), (law) => kl(goal, law))}`; // that of the best leaves float64
    };
  });
})();
