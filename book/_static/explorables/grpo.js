"use strict";
(() => {
  const { sum, dot, tilt, totalVariation, PAD, TOP, START, GOAL, CURVE, SOFT, DASH, THICK } = bookjs;
  const { scale, text, line, curve, svg, axes, below, point, bars, key, bar, digits, control, choice, decades } = bookjs;

  // pi = beta p / (mu - r), and mu; mu - max r lies in (0, beta], found by bisection.
  function pole(p, r, beta) {
    const gaps = r.map((x) => Math.max(...r) - x);
    let low = 0, high = beta;
    for (let i = 0; i < 200; i++) {
      const middle = (low + high) / 2;
      if (beta * sum(p.map((q, k) => q / (middle + gaps[k]))) > 1) low = middle; else high = middle;
    }
    const mass = p.map((q, k) => q / (high + gaps[k]));
    return [mass.map((m) => m / sum(mass)), high + Math.max(...r)];
  }

  // All ways to split a group over three outcomes: [log multiplicity, counts, share of y times the score of y].
  function groups(r, size) {
    const found = [], logFactorial = [0];
    for (let n = 1; n <= size; n++) logFactorial.push(logFactorial[n - 1] + Math.log(n));
    for (let a = 0; a <= size; a++) {
      for (let b = 0; a + b <= size; b++) {
        const counts = [a, b, size - a - b], share = counts.map((n) => n / size);
        const centred = r.map((x) => dot(share, r.map((y) => x - y))); // differences first: near ties
        const sd = Math.sqrt(dot(share, centred.map((x) => x ** 2)));
        const score = centred.map((x, k) => (sd > 1e-9 ? (share[k] * x) / sd : 0));
        found.push([logFactorial[size] - sum(counts.map((n) => logFactorial[n])), counts, score]);
      }
    }
    return found;
  }
  // f(y) = E[(r(y) - mean) / sd | y_1 = y], since law(y) f(y) = E[share of y times its score].
  function effectiveReward(logLaw, ways) {
    const f = logLaw.map(() => 0);
    for (const [multiplicity, counts, score] of ways) {
      const chance = Math.exp(multiplicity + dot(counts, logLaw));
      score.forEach((s, k) => { f[k] += chance * s; });
    }
    return f.map((v, k) => v / Math.exp(logLaw[k]));
  }
  const normalised = (logs) => {
    const top = Math.max(...logs), total = Math.log(sum(logs.map((x) => Math.exp(x - top))));
    return logs.map((x) => x - top - total);
  };
  // The tilt by f, or the pole with f for r, where f comes from the law itself: damped steps from p, so that they
  // settle. Returns the law and f.
  function dividedLaw(p, r, size, beta, local = tilt) {
    const ways = groups(r, size);
    let law = p.map(Math.log), f, moved = 1;
    for (let i = 0; i < 300 && moved > 1e-14; i++) {
      f = effectiveReward(law, ways);
      const goal = local(p, f, beta);
      const next = normalised(law.map((x, k) => 0.8 * x + 0.2 * Math.log(goal[k])));
      moved = Math.max(...next.map((x, k) => Math.abs(x - law[k])));
      law = next;
    }
    return [law.map(Math.exp), f];
  }

  // What each loss is stationary at, and what there is to say of it.
  const ownMean = (beta, G) => beta / (1 - 1 / G);
  const rest = (b) => `the tilt at <i>β′</i> = ${b.toPrecision(3)}`;
  const polar = (b, mu) =>
    `the law <i>β′p</i>/(<i>μ</i> − <i>r</i>), <i>β′</i> = ${b.toPrecision(3)}, <i>μ</i> = ${mu.toPrecision(3)}`;
  const shown = (f) => f.map((x) => x.toFixed(2).replace("-", "−")).join(", ");
  const onlyPole = (...problem) => pole(...problem)[0];
  const LOSSES = {
    "k₂, leave-one-out": (p, r, beta) => [tilt(p, r, beta), "the tilt itself"],
    "k₂, group mean": (p, r, beta, G) => [tilt(p, r, ownMean(beta, G)), rest(ownMean(beta, G))],
    "k₃, leave-one-out": (p, r, beta) => { const [law, mu] = pole(p, r, beta); return [law, polar(beta, mu)]; },
    "k₃, group mean": (p, r, beta, G) => {
      const b = ownMean(beta, G), [law, mu] = pole(p, r, b);
      return [law, polar(b, mu)];
    },
    "k₂, divided by sd": (p, r, beta, G) => {
      const [law, f] = dividedLaw(p, r, G, beta);
      return [law, `the tilt by <i>f</i> = (${shown(f)})`];
    },
    "k₃, divided by sd": (p, r, beta, G) => {
      const [law, f] = dividedLaw(p, r, G, beta, onlyPole);
      return [law, `the law <i>βp</i>/(<i>β</i> − <i>f</i>), <i>f</i> = (${shown(f)})`];
    },
  };

  bookjs.explorable("grpo", (root, { p = [0.5, 0.3, 0.2], rewards: r = [0, 1, 2], ...from }) => {
    const { loss = "k₃, leave-one-out", size = 8, beta = 1 } = from;
    const betas = decades(-1, 1).filter((b) => b >= 0.2 && b <= 5), best = r.indexOf(Math.max(...r));
    const getLoss = choice(root, "loss", Object.keys(LOSSES), loss);
    const getG = control(root, "G", "group size", [2, 3, 4, 6, 8, 12, 16, 32], size);
    const getBeta = control(root, "β", "coefficient", betas, beta);
    root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "where training rests") + key(THICK, "<i>π*</i>, the tilt")
      + key(DASH, "<i>p</i>, the reference");
    const finely = Array.from({ length: 29 }, (_, i) => 0.2 * 25 ** (i / 28)), curves = {};
    const along = (name, G) => (curves[[name, G]] ??= finely.map((b) => LOSSES[name](p, r, b, G)[0][best]));
    return (width, height, panels) => {
      const name = getLoss(), G = getG(), b = getBeta(), goal = tilt(p, r, b), [law, words] = LOSSES[name](p, r, b, G);
      panels[0].innerHTML = bars(width, height, "Probability of each outcome", [law], [SOFT], p, goal, r);

      const x = scale(Math.log(0.2), Math.log(5), PAD + 8, width - 12), y = scale(0, 1, height - PAD, TOP + 6);
      const path = (masses) => finely.map((v, i) => [x(Math.log(v)), y(masses[i])]);
      panels[1].innerHTML = svg(width, height, "Mass of the best outcome against beta",
        axes(width, height, "mass of the best outcome") + below(width, height, "β")
        + ["¼", "½", "1", "2", "4"].map((s, i) => text(x(Math.log(2 ** (i - 2))), height - PAD + 16, s)).join("")
        + [0, 0.5, 1].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
        + line(PAD, y(p[best]), width - 4, y(p[best]), START)
        + curve(path(finely.map((v) => tilt(p, r, v)[best])), GOAL) + curve(path(along(name, G)), CURVE)
        + point([x(Math.log(b)), y(law[best])]));
      return `<i>G</i> = ${G}, <i>β</i> = ${b}: ${words} &emsp; best outcome ${law[best].toFixed(3)}, under <i>π*</i> `
        + `${goal[best].toFixed(3)} &emsp; TV to <i>π*</i> = ${digits(totalVariation(law, goal))}`;
    };
  });
  Object.assign(bookjs, { pole, groups, effectiveReward, dividedLaw, onlyPole, grpoLosses: LOSSES });
})();
