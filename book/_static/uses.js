"use strict";
// What rests on what: a name that is pointed at, focused or tapped lights its arcs and their other ends. On a touch
// screen the first tap lights, the second follows the link.
document.addEventListener("DOMContentLoaded", () => {
  for (const svg of document.querySelectorAll(".bk-uses")) {
    const arcs = [...svg.querySelectorAll("path")], names = [...svg.querySelectorAll("a[data-end]")];
    const ends = (arc) => arc.dataset.ends.split(" ");
    let lit = "", tapped = false;
    const light = (name) => {
      lit = name;
      for (const arc of arcs) {
        arc.style.cssText = ends(arc).includes(name) ? "stroke: #d9722e; stroke-opacity: 1; stroke-width: 2.4" : "";
      }
      const joined = new Set(arcs.filter((arc) => ends(arc).includes(name)).flatMap(ends));
      for (const link of names) link.style.cssText = joined.has(link.dataset.end) ? "font-weight: 700" : "";
    };
    for (const link of names) {
      const name = link.dataset.end;
      link.addEventListener("pointerdown", (event) => { tapped = event.pointerType === "touch" && lit !== name; });
      link.addEventListener("pointerenter", (event) => { if (event.pointerType !== "touch") light(name); });
      link.addEventListener("focus", () => light(name));
      link.addEventListener("click", (event) => {
        if (tapped) event.preventDefault();
        light(name);
      });
    }
  }
});
