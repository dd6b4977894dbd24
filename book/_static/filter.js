"use strict";
// A box above the claims that hides those without the words typed into it. Without a script all are shown.
document.addEventListener("DOMContentLoaded", () => {
  const claims = [...document.querySelectorAll(".claim, .claims-list > li")];
  if (!claims.length) return;
  const box = document.createElement("p");
  box.className = "bk-filter";
  box.innerHTML = '<label>Filter <input type="text" placeholder="words, such as sampled or N-1"></label> <output></output>';
  claims[0].closest("article").querySelector("h1").after(box);
  box.addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const claim of claims) {
      const text = claim.textContent.toLowerCase();
      claim.hidden = !words.every((word) => text.includes(word));
      left += !claim.hidden;
    }
    for (const list of document.querySelectorAll(".claims-list"))
      list.closest("section").hidden = [...list.children].every((line) => line.hidden);
    box.querySelector("output").textContent = words.length ? `${left} of ${claims.length}` : "";
  });
});
