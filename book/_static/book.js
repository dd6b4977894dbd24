"use strict";
// Interactives of the book, computed in the page: no library, no network. A page says
// <div class="bk-explorable" data-name="..." data-options='{...}'>, see tiltlib.figures.explorable.
(() => {
  const BLUE = "#3b82c4", ORANGE = "#d9722e", GREEN = "#2e9e6b", PAD = 34, TOP = 20; // room for the labels of the axes, in pixels
  const sum = (x) => x.reduce((a, b) => a + b, 0);
  const dot = (x, y) => sum(x.map((a, k) => a * y[k]));

  // Numbers. Arrays in, arrays out; the book's browser test compares them with tiltlib.
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
      // Near s = 0, M is 1 minus a little: taking the little alone keeps its digits, which the power N - 1 needs.
      const logM = s < 1
        ? Math.log1p(dot(p, w.map((x) => Math.expm1(-s * x))))
        : Math.log(dot(p, w.map((x) => Math.exp(-s * x))));
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

  // Drawing. A picture is redrawn at the width it has, so that text keeps its size on a phone.
  const scale = (from, to, a, b) => (x) => a + ((x - from) / (to - from)) * (b - a);
  const text = (x, y, s, anchor = "middle") => `<text x="${x}" y="${y}" text-anchor="${anchor}">${s}</text>`;
  const line = (x1, y1, x2, y2, more = "") => `<path d="M${x1} ${y1}L${x2} ${y2}" ${more}/>`;
  const power = (e) => (e ? `10<tspan dy="-5" font-size="10">${String(e).replace("-", "−")}</tspan>` : "1");
  const curve = (points, more) => `<path d="M${points.map((q) => q.join(" ")).join("L")}" fill="none" ${more}/>`;
  const svg = (width, height, label, body) =>
    `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" aria-label="${label}"
      fill="currentColor" stroke="none">${body}</svg>`;
  const axes = (width, height, name) => text(2, 11, name, "start")
    + `<path d="M${PAD} ${TOP}V${height - PAD}H${width - 4}" fill="none" stroke="currentColor"/>`;
  const START = 'stroke="currentColor" stroke-width="2" stroke-dasharray="3 3"';
  const GOAL = `stroke="${ORANGE}" stroke-width="4"`, CURVE = `stroke="${BLUE}" stroke-width="2.5"`;
  const below = (width, height, name) => text((width + PAD) / 2, height - 3, name);
  const point = ([x, y], style = `stroke="${BLUE}"`) => // in the colour of its curve
    `<circle cx="${x}" cy="${y}" r="6" fill="${style.match(/stroke="([^"]*)"/)[1]}" stroke="currentColor" stroke-width="1.5"/>`;

  // A bar per outcome and law, with a dashed mark where it starts and, if there is a goal, a thick one where it goes.
  function bars(width, height, label, laws, fills, start, goal, names) {
    const y = scale(0, 1, height - PAD, TOP), step = (width - PAD - 4) / names.length, wide = (0.64 / laws.length) * step;
    const one = (name, k) => {
      const x = PAD + step * (k + 0.5), mark = (u, style) => line(x - step * 0.42, y(u), x + step * 0.42, y(u), style);
      const bar = (law, i) => `<rect x="${x - step * 0.32 + i * wide}" y="${y(law[k])}" width="${wide * 0.9}"
        height="${y(0) - y(law[k])}" ${fills[i]}/>`;
      return laws.map(bar).join("") + mark(start[k], START) + (goal ? mark(goal[k], GOAL) : "")
        + text(x, height - PAD + 16, name);
    };
    return svg(width, height, label, axes(width, height, "probability") + below(width, height, "reward of the outcome")
      + [0, 0.5, 1].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("") + names.map(one).join(""));
  }

  // A slider over a list of values; returns a function that tells the chosen one.
  function control(root, symbol, name, values, value) {
    const off = values.map((v) => Math.abs(Math.log(v / value))), nearest = off.indexOf(Math.min(...off));
    const row = document.createElement("label");
    row.innerHTML = `<span>${name} <i>${symbol}</i></span><input type="range" min="0" max="${values.length - 1}" step="1"
      value="${nearest}" autocomplete="off"><span class="bk-value"></span>`;
    root.querySelector(".bk-controls").append(row);
    const input = row.querySelector("input"), now = () => values[input.value];
    const say = () => {
      row.querySelector(".bk-value").textContent = `${now()}`;
      input.setAttribute("aria-valuetext", `${symbol} = ${now()}`);
    };
    input.addEventListener("input", say);
    say();
    return now;
  }
  // 1, 1.3, 1.6, 2, ... : ten values a decade, two digits each.
  const decades = (from, to) => {
    const all = Array.from({ length: (to - from) * 10 + 1 }, (_, i) => 10 ** (from + i / 10));
    return all.map((v) => +v.toPrecision(2));
  };
  const key = (mark, words) =>
    `<span><svg width="26" height="14" aria-hidden="true" fill="currentColor">${mark}</svg> ${words}</span>`;
  const SOFT = `fill="${BLUE}"`, NOISE = `fill="${GREEN}"`, HARD = 'fill="currentColor" opacity="0.4"';
  const bar = (fill) => `<rect x="6" width="14" height="14" ${fill}/>`;
  const DASH = line(0, 7, 26, 7, START), THICK = line(0, 7, 26, 7, GOAL);
  const digits = (x) => (x === 0 || x >= 1e-3 ? x.toPrecision(3) : `${x.toExponential(2).replace("e-", "·10<sup>−")}</sup>`);
  const rounded = (x) => (x < 1e-12 ? "below 10<sup>−12</sup>" : digits(x)); // no more is left of differences

  const explorables = {
    "soft-best-of-n"(root, { p = [0.5, 0.3, 0.2], rewards: r = [0, 1, 2], n = 16, beta = 1 }) {
      const sizes = [...new Set(decades(0, 4).map(Math.round))], betas = [0.05, 0.063, 0.08, ...decades(-1, 1)];
      const getN = control(root, "N", "candidates", sizes, n), getBeta = control(root, "β", "temperature", betas, beta);
      root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "soft") + key(bar(NOISE), "exponential noise")
        + key(bar(HARD), "best") + key(DASH, "<i>p</i>, the reference") + key(THICK, "<i>π*</i>, the tilt");
      const rules = [ // name, law, fill of a bar, line of a curve, and where its name stands: index of a size, below or above
        ["soft", (m, b) => softBestOfN(p, r, m, b), SOFT, CURVE, 20, -6],
        ["noise", (m, b) => exponentialBestOfN(p, r, m, b), NOISE, `stroke="${GREEN}" stroke-width="2.5"`, 8, 14],
        ["best", (m) => bestOfN(p, r, m), HARD, 'stroke="currentColor" stroke-width="2.5" opacity="0.4"', 24, -8],
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
    },

    tilt(root, { p = [0.14, 0.3, 0.28, 0.15, 0.07, 0.035, 0.015, 0.007, 0.003], rewards: r = [...p.keys()], beta = 2 }) {
      const getBeta = control(root, "β", "temperature", decades(-1, 2).reverse(), beta);
      root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "<i>π*</i>, the tilt")
        + key(DASH, "<i>p</i>, the reference, and the tangent of slope <i>β</i>");
      const start = dot(p, r), top = Math.max(...r), far = 1.1 * kl(tilt(p, r, 0.01), p);
      const finely = Array.from({ length: 121 }, (_, i) => tilt(p, r, 10 ** (2 - i / 40)));
      const frontier = [[0, start], ...finely.map((pi) => [kl(pi, p), dot(pi, r)]), [far, top]];
      return (width, height, panels) => {
        const b = getBeta(), pi = tilt(p, r, b), mean = dot(pi, r), cost = kl(pi, p);
        panels[0].innerHTML = bars(width, height, "Probability of each outcome", [pi], [SOFT], p, null, r);

        const x = scale(0, far, PAD, width - 4), y = scale(start - 0.12 * (top - start), top, height - PAD, TOP + 8);
        const path = frontier.map(([u, v]) => [x(u), y(v)]), cx = x(cost), cy = y(mean);
        const dx = x(1) - x(0), dy = b * (y(1) - y(0)), on = 55 / Math.hypot(dx, dy);
        const back = Math.min(on, (cx - PAD) / dx); // the tangent stops at the axis
        panels[1].innerHTML = svg(width, height, "Mean reward against KL from the reference",
          axes(width, height, "mean reward") + below(width, height, "KL(π ‖ p)")
          + `<path d="M${PAD} ${TOP}L${path.map((q) => q.join(" ")).join("L")}V${TOP}Z" opacity="0.08"/>`
          + text(PAD + 12, TOP + 20, "no law reaches here", "start")
          + [...Array(Math.ceil(far)).keys()].map((v) => text(x(v), height - PAD + 16, v)).join("")
          + r.filter((v) => v >= start).map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
          + curve(path, CURVE) + line(cx - back * dx, cy - back * dy, cx + on * dx, cy + on * dy, START) + point([cx, cy]));
        return `E<sub>π*</sub><i>r</i> = ${digits(mean)} &emsp; KL(<i>π*</i> ‖ <i>p</i>) = ${digits(cost)}`
          + ` &emsp; slope of the frontier = <i>β</i> = ${b}`;
      };
    },

    churn(root, { A = 1, B = 2, g = 3, c = 1 }) {
      const scales = [1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10];
      const churns = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.63, 0.8, 1, 1.3, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8, 10];
      const getG = control(root, "g", "scale", scales, g), getC = control(root, "c", "churn", churns, c);
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
    },
  };

  function start(root) {
    const make = explorables[root.dataset.name];
    if (!make) return; // the words inside stay
    root.innerHTML = '<div class="bk-panels"><div></div><div></div></div><p class="bk-key"></p>'
      + '<div class="bk-controls"></div><output></output>';
    const draw = make(root, JSON.parse(root.dataset.options || "{}")), panels = root.querySelectorAll(".bk-panels > div");
    const update = () => {
      root.querySelector("output").innerHTML = draw(Math.max(240, panels[0].clientWidth), 250, panels);
    };
    root.addEventListener("input", update);
    // Follows the box, not the window: on a window event the box may still have its old width.
    new ResizeObserver(update).observe(root.querySelector(".bk-panels"));
  }
  window.bookjs = { tilt, softBestOfN, exponentialBestOfN, bestOfN, totalVariation, kl, churnVariance, tiltVariance, normalDistance };
  const ready = () => document.querySelectorAll(".bk-explorable").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", ready);
  else ready();
})();
