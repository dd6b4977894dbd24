"use strict";
(() => {
  const { sum, totalVariation, BLUE, ORANGE, PAD, TOP, GOAL, START, SOFT, DASH, THICK, control, choice } = bookjs;
  const { scale, text, svg, axes, below, line, key, bar } = bookjs;

  // Strings of three symbols, a or b; a prefix of t symbols is a number of t bits, with 0 for a. A symbol has a probability
  // and, from the second on, a worth that depend on the symbol before it. The weight of a string is the product of its worths.
  const STEPS = [1, 2, 3], L = 3, FIRST = [0.6, 0.4], NEXT = [[0.7, 0.3], [0.2, 0.8]], WORTH = [[1, 3], [0.5, 4]];
  const prefixes = (t) => Array.from({ length: 2 ** t }, (_, s) => s);
  const name = (t, s) => STEPS.slice(0, t).map((u) => "ab"[(s >> (t - u)) & 1]).join("");
  const last = (table, first) => (t, s) => (t === 1 ? first[s] : table[(s >> 1) & 1][s & 1]);
  const chance = last(NEXT, FIRST), worth = last(WORTH, [1, 1]);
  const product = (f) => prefixes(L).map((s) => STEPS.reduce((m, t) => m * f(t, s >> (L - t)), 1));
  const reference = product(chance), weights = product(worth), Z = sum(reference.map((p, s) => p * weights[s]));
  const target = reference.map((p, s) => (p * weights[s]) / Z);

  // The mean worth of what follows the last of t symbols. The twist is its power: 0 does not look ahead, 1 is exact.
  const ahead = (t, u) => (t === L ? 1 : sum([0, 1].map((v) => NEXT[u][v] * WORTH[u][v] * ahead(t + 1, v))));
  const gain = (t, s, twist) => worth(t, s) * (ahead(t, s & 1) / (t > 1 ? ahead(t - 1, (s >> 1) & 1) : 1)) ** twist;
  const gains = (since, t, s, twist) => // the weight of a prefix that had weight 1 after `since` symbols
    STEPS.filter((u) => u > since && u <= t).reduce((m, u) => m * gain(u, s >> (t - u), twist), 1);
  const uneven = (w, threshold) => sum(w) ** 2 / sum(w.map((x) => x * x)) < threshold * w.length * (1 - 1e-9);

  const choose = (n, k) => (k ? (choose(n - 1, k - 1) * n) / k : 1);
  const shareOut = (n, chances) => (chances.length === 1 ? [[[n], chances[0] ** n]] // all ways: [counts, probability]
    : Array.from({ length: n + 1 }, (_, k) => shareOut(n - k, chances.slice(1))
      .map(([counts, c]) => [[k, ...counts], choose(n, k) * chances[0] ** k * c])).flat());
  const drawn = (t, counts) => prefixes(t - 1).reduce((ways, s) => ways.flatMap(([so_far, c]) =>
    shareOut(counts[s], [chance(t, 2 * s), chance(t, 2 * s + 1)]).map(([two, d]) => [[...so_far, ...two], c * d])), [[[], 1]]);

  // The law of the string that one picks, the mean of Z_hat / Z, and how often one resamples, exactly. Particles with one
  // prefix are alike, so a state says how many have each prefix and after which step their weights were last 1; it has a
  // probability `mass`, and z is this times the mean of what was taken out of the weights. Ancestors are independent draws.
  function merged(states) {
    const found = new Map();
    for (const { counts, since, mass, z } of states) {
      const id = `${counts} ${since}`, state = found.get(id) ?? { counts, since, mass: 0, z: 0 };
      found.set(id, { ...state, mass: state.mass + mass, z: state.z + z });
    }
    return [...found.values()];
  }
  function particleLaw(n, twist, threshold, carried) {
    let states = [{ counts: [n], since: 0, mass: 1, z: 1 }], resampled = 0;
    for (const t of STEPS) {
      if (t > 1) states = merged(states.flatMap((state) => {
        const w = prefixes(t - 1).map((s) => gains(state.since, t - 1, s, twist)), share = w.map((x, s) => state.counts[s] * x);
        const again = uneven(w.flatMap((x, s) => Array(state.counts[s]).fill(x)), threshold), total = sum(share);
        if (!again && carried) return [state];
        resampled += again ? state.mass : 0;
        const ways = again ? shareOut(n, share.map((x) => x / total)).filter((way) => way[1] > 0) : [[state.counts, 1]];
        return ways.map(([counts, c]) => ({ counts, since: t - 1, mass: c * state.mass, z: (c * state.z * total) / n }));
      }));
      states = merged(states.flatMap((state) =>
        drawn(t, state.counts).map(([counts, c]) => ({ ...state, counts, mass: c * state.mass, z: c * state.z }))));
    }
    const law = reference.map(() => 0);
    let ratio = 0;
    for (const { counts, since, mass, z } of states) {
      const share = law.map((_, s) => counts[s] * gains(since, L, s, twist));
      share.forEach((x, s) => { law[s] += (mass * x) / sum(share); });
      ratio += (z * sum(share)) / n / Z;
    }
    return { law, ratio, resampled };
  }

  function uniforms(seed) { // mulberry32: the same numbers on every machine
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }
  function oneSystem(n, twist, threshold, carried, seed) { // one run: per step ancestors, prefixes, weights, and what it says
    const draw = uniforms(seed), one = (share, u) => share.findIndex((x) => (u -= x / sum(share)) < 0);
    const steps = [];
    let strings = Array(n).fill(0), w = Array(n).fill(1), ratio = 1 / Z;
    for (const t of STEPS) {
      const again = t > 1 && uneven(w, threshold), parents = w.map((_, i) => (again ? one(w, draw()) : i)).sort((i, j) => i - j);
      if (again || (t > 1 && !carried)) { ratio *= sum(w) / n; w = w.map(() => 1); }
      strings = parents.map((i) => 2 * strings[i]).map((s) => s + (draw() < chance(t, s) ? 0 : 1));
      w = w.map((x, i) => x * gain(t, strings[i], twist));
      steps.push({ parents, strings, w, again });
    }
    return { steps, ratio: (ratio * sum(w)) / n, picked: one(w, draw()) };
  }

  function genealogy(width, height, { steps, picked }, carried) {
    const n = steps[0].w.length, x = scale(0, L - 1, 22, width - 62), y = scale(0, n - 1, TOP + 22, height - 24);
    let alive = new Set(steps[0].w.map((_, i) => i)); // from the end back: who has descendants
    const lines = [], discs = [];
    for (let t = L - 1; t >= 0; t--) {
      const { parents, strings, w, again } = steps[t], more = (i) => `opacity="${alive.has(i) ? 1 : 0.35}"`;
      strings.forEach((s, i) => {
        const at = `cx="${x(t)}" cy="${y(i)}"`, ring = t === L - 1 && i === picked ? `stroke="${ORANGE}" stroke-width="3"` : "";
        discs.push(`<circle ${at} r="${3 + 14 * Math.sqrt(w[i] / sum(w))}" fill="${BLUE}" fill-opacity="0.45"
          ${more(i)} ${ring}/>` + text(x(t), y(i) + 4, "ab"[s & 1]) + (t === L - 1 ? text(x(t) + 22, y(i) + 4, name(L, s), "start") : ""));
        if (t) lines.push(line(x(t - 1) + 9, y(parents[i]), x(t) - 9, y(i), `stroke="${alive.has(i) ? BLUE : "currentColor"}" `
          + `stroke-width="${alive.has(i) ? 2 : 1}" ${more(i)}`));
      });
      if (t) lines.push(text((x(t - 1) + x(t)) / 2, 13, again ? "resampled" : carried ? "weights carried" : "weights dropped"));
      alive = new Set([...alive].map((i) => parents[i]));
    }
    return svg(width, height, "Particles and their ancestors", lines.join("") + discs.join(""));
  }

  function laws(width, height, law) {
    const y = scale(0, 0.8, height - PAD, TOP), step = (width - PAD - 4) / law.length;
    const group = (s) => {
      const x = PAD + step * (s + 0.5), mark = (v, style) => line(x - step * 0.42, y(v), x + step * 0.42, y(v), style);
      return `<rect x="${x - step * 0.3}" y="${y(law[s])}" width="${step * 0.6}" height="${y(0) - y(law[s])}" ${SOFT}/>`
        + mark(reference[s], START) + mark(target[s], GOAL) + text(x, height - PAD + 16, name(L, s));
    };
    return svg(width, height, "Law of the picked string", axes(width, height, "probability") + below(width, height, "string")
      + [0, 0.4, 0.8].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("") + prefixes(L).map(group).join(""));
  }

  bookjs.explorable("particles", (root, { n = 6, twist = 1, threshold = 0.8, weights: start = "dropped" }) => {
    const getTwist = control(root, "", "twist <i>θ</i> (1 = exact)", Array.from({ length: 9 }, (_, i) => i / 4), twist);
    const getThreshold = control(root, "", "threshold", [0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1], threshold);
    const getSystem = control(root, "", "system drawn", Array.from({ length: 30 }, (_, i) => i + 1), 1);
    const getWeights = choice(root, "weights", ["dropped", "carried"], start);
    root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "law of the picked string, exact") + key(THICK, "<i>π*</i>, the tilt")
      + key(DASH, "<i>p</i>, the reference");
    return (width, height, panels) => {
      const setting = [n, getTwist(), getThreshold(), getWeights() === "carried"];
      const { law, ratio, resampled } = particleLaw(...setting), system = oneSystem(...setting, getSystem());
      panels[0].innerHTML = genealogy(width, height, system, setting[3]);
      panels[1].innerHTML = laws(width, height, law);
      return `weights ${getWeights()}, threshold ${getThreshold()}: TV to the tilt ${totalVariation(law, target).toFixed(3)}, `
        + `mean of <i>Ẑ/Z</i> ${ratio.toFixed(3)}, resampled ${resampled.toFixed(2)} times a run. System ${getSystem()}: <i>Ẑ/Z</i> = `
        + `${system.ratio.toFixed(2)}, picked ${name(L, system.steps[L - 1].strings[system.picked])}`;
    };
  });
  Object.assign(bookjs, { particleLaw, oneSystem });
})();
