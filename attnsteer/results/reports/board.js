"use strict";
// Filters of a board; without them every row is shown.
(() => {
  const filters = [...document.querySelectorAll("select[data-filter]")];
  const search = document.getElementById("search");
  const blocks = [...document.querySelectorAll(".block")];
  function show() {
    const wanted = Object.fromEntries(filters.map((f) => [f.dataset.filter, f.value]));
    const text = search.value.trim().toLowerCase();
    let shown = 0, all = 0;
    for (const block of blocks) {
      const whole = ["model", "task"].every((k) => !wanted[k] || block.dataset[k] === wanted[k]);
      let own = 0;
      for (const row of block.querySelectorAll("tr[data-method]")) {
        const fits = whole && ["method", "verdict"].every((k) => !wanted[k] || row.dataset[k] === wanted[k]) &&
          (!text || row.textContent.toLowerCase().includes(text));
        row.hidden = !fits;
        own += fits;
        all += 1;
      }
      block.hidden = !own;
      shown += own;
    }
    document.getElementById("shown").textContent = `${shown} of ${all} runs`;
  }
  for (const filter of filters) {
    filter.closest("label").hidden = filter.options.length < 3;
    filter.addEventListener("change", show);
  }
  search.addEventListener("input", show);
  document.querySelector(".tools").hidden = false;
  show();
})();
