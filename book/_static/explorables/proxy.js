"use strict";
(() => {
  const { dot, tilt, totalVariation, PAD, TOP, GOAL, CURVE, SOFT, DASH, THICK } = bookjs;
  const { scale, text, line, curve, svg, axes, below, point, bars, key, bar, control, decades } = bookjs;

  // A judge is right but for one outcome, the last: it is worth nothing, and the judge gives it `error` points. What the
  // tilt by the judge earns in truth and by the judge, and its distance from the tilt by the truth beside the bound.
  function judged(p, truth, error, beta) {
    const proxy = truth.map((x, k) => (k === truth.length - 1 ? x + error : x)), law = tilt(p, proxy, beta);
    const goal = tilt(p, truth, beta), tv = totalVariation(law, goal);
    return { law, goal, truth: dot(law, truth), proxy: dot(law, proxy), tv, bound: Math.tanh(error / beta / 4) };
  }

  bookjs.explorable("proxy", (root, { p = [0.14, 0.3, 0.28, 0.15, 0.07, 0.035, 0.015, 0.007, 0.003], error = 10, beta = 1.3 }) => {
    const truth = [0, 1, 2, 3, 4, 5, 6, 7, 0], betas = decades(-1, 1).reverse(), errors = [0, 2, 4, 5, 6, 7, 8, 10, 12, 15, 20];
    const getBeta = control(root, "β", "temperature", betas, beta), getError = control(root, "δ", "error", errors, error);
    const DOTS = 'stroke="currentColor" stroke-width="2" stroke-dasharray="1 3"';
    root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "tilt by the judge") + key(line(0, 7, 26, 7, CURVE), "its true mean")
      + key(line(0, 7, 26, 7, DOTS), "its mean by the judge") + key(THICK, "tilt by the truth") + key(DASH, "<i>p</i>")
      + "<span>?: worth 0, the judge says <i>δ</i></span>";
    return (width, height, panels) => {
      const b = getBeta(), d = getError(), now = judged(p, truth, d, b), all = betas.map((x) => judged(p, truth, d, x));
      panels[0].innerHTML = bars(width, height, "Probability of each outcome", [now.law], [SOFT], p, now.goal,
        [...truth.slice(0, -1), "?"]);

      const top = Math.max(7, d), x = scale(-1, 1, PAD, width - 8), y = scale(0, top, height - PAD, TOP + 4);
      const on = (value) => betas.map((u, i) => [x(-Math.log10(u)), y(value(all[i], u))]), best = all.map((a) => a.truth);
      const turn = best.indexOf(Math.max(...best)), cx = x(-Math.log10(b));
      panels[1].innerHTML = svg(width, height, "Mean reward against the temperature, true and by the judge",
        axes(width, height, "mean reward") + below(width, height, "temperature β, falling")
        + [10, 3, 1, 0.3, 0.1].map((v) => text(x(-Math.log10(v)), height - PAD + 16, v, v === 0.1 ? "end" : "middle")).join("")
        + [0, Math.round(top / 2), top].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
        + line(x(-Math.log10(betas[turn])), y(0), x(-Math.log10(betas[turn])), y(best[turn]), DOTS)
        + curve(on((a) => dot(a.goal, truth)), GOAL) + curve(on((a) => a.proxy), DOTS) + curve(on((a) => a.truth), CURVE)
        + point([cx, y(now.truth)]));
      const peak = turn === betas.length - 1 ? "it never turns" : `largest, ${best[turn].toFixed(2)}, at <i>β</i> = ${betas[turn]}`;
      return `true mean ${now.truth.toFixed(2)} (${peak}), by the judge ${now.proxy.toFixed(2)} &emsp; TV of the two tilts `
        + `${now.tv.toFixed(3)}, at&nbsp;most tanh(<i>δ</i>/4<i>β</i>)&nbsp;=&nbsp;${now.bound.toFixed(3)}`;
    };
  });
  Object.assign(bookjs, { judged });
})();
