"use strict";
// The browser of samples. Everything that came with the data is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const pictures = data.samples.some((s) => Object.values(s.outs).some((o) => o.image !== null && o.image !== undefined));
  const SIZE = pictures ? 12 : 10;
  const state = { only: "all", search: "", order: "run", arm: data.arm, page: 0, flip: false, swap: false, boxes: true };

  function make(name, attributes = {}, ...inner) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...inner.filter((x) => x !== null && x !== undefined));
    return node;
  }
  function draw(name, attributes) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }
  const number = (v) => (v === null || v === undefined ? "–" : String(Math.round(v * 1000) / 1000));
  // A figure of one sample in words: "right: yes", or "recall 0.5".
  const figure = (v) => (data.binary ? `${data.name}: ${v ? "yes" : "no"}` : `${data.name} ${number(v)}`);
  const knowsBoxes = () => data.arms.find((a) => a.id === state.arm).boxes;
  const label = (id) => (data.arms.find((a) => a.id === id) || { label: id }).label;
  const after = (s) => s.outs[state.arm] || {};
  const base = () => data.arms.find((a) => a.id === state.arm).base;
  const before = (s) => s.outs[base()] || {};
  const change = (s) => Math.abs((after(s).v ?? 0) - (before(s).v ?? 0));
  const is = (s, only) => {
    const found = after(s).state;
    return only === "all" || found === only || (only === "changed" && found !== "same" && found !== undefined);
  };
  function text(s) {
    const made = Object.values(s.outs).map((o) => `${o.text ?? ""} ${o.found ?? ""}`);
    return [s.id, s.prompt, s.truth ?? "", ...(s.choices ?? []), ...made].join("\n").toLowerCase();
  }

  // Words of a and b in order, with what was taken out and put in (longest common subsequence).
  function difference(a, b) {
    const x = a.split(/(\s+)/), y = b.split(/(\s+)/);
    if (x.length * y.length > 250000) return null;
    const best = Array.from({ length: x.length + 1 }, () => new Uint16Array(y.length + 1));
    for (let i = x.length - 1; i >= 0; i--)
      for (let j = y.length - 1; j >= 0; j--)
        best[i][j] = x[i] === y[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    const one = [], two = [];
    let i = 0, j = 0;
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) { one.push(x[i]); two.push(x[i]); i++; j++; }
      else if (j >= y.length || (i < x.length && best[i + 1][j] >= best[i][j + 1])) one.push(x[i].trim() ? make("del", {}, x[i++]) : x[i++]);
      else two.push(y[j].trim() ? make("ins", {}, y[j++]) : y[j++]);
    }
    return [one, two];
  }

  function prompt(s) {
    const long = 240;
    const node = make("p", { class: "prompt" });
    if (s.prompt.length <= long) { node.append(s.prompt); return node; }
    // What is asked stands at the end.
    const more = make("button", { type: "button", "aria-expanded": "false" }, "show all");
    more.addEventListener("click", () => node.replaceChildren(s.prompt));
    node.append(more, ` … ${s.prompt.slice(-long).replace(/^\S*\s/, "")}`);
    return node;
  }

  function choices(s) {
    const node = make("div", { class: "choices" });
    const one = before(s), two = after(s);
    s.choices.forEach((choice, i) => {
      const picks = [one.pick === i ? "baseline" : null, two.pick === i ? "method" : null].filter(Boolean).join(", ");
      const name = make("span", { class: i === s.answer ? "c right" : "c" }, `${choice}${i === s.answer ? " ✓" : ""}`);
      const bars = make("span", { class: "bars" });
      for (const [key, out] of [["b", one], ["m", two]]) {
        const bar = make("i", { class: key });
        bar.style.width = `${100 * (out.p ? out.p[i] : 0)}%`;
        bars.append(bar);
      }
      const share = (o) => (o.p ? Math.round(100 * o.p[i]) : "–");
      node.append(name, bars, make("span", { class: "n", title: picks ? `chosen by ${picks}` : "" }, `${share(one)} → ${share(two)} %`));
    });
    const name = (o) => (o.pick === undefined ? "–" : `${s.choices[o.pick]} ${o.pick === s.answer ? "✓" : "✗"}`);
    return [node, make("p", { class: "truth" }, `chosen: ${name(one)} → ${name(two)}`)];
  }

  // Where the labels of boxes stand (their right or left edge on the box's, their lower edge at `bottom`, a share of the side),
  // so that none lies on another. A picture is about 200 pixels wide.
  function places(boxes) {
    const height = 0.07, wide = (name) => 0.033 * name.length, taken = [];
    return boxes.map(([name, x0, y0, x1, y1]) => {
      const right = x0 + x1 > 1;
      const left = right ? x1 - wide(name) : x0;
      const free = (bottom) => bottom >= height && bottom <= 0.99 &&
        !taken.some((t) => left < t.left + t.width && t.left < left + wide(name) && Math.abs(t.bottom - bottom) < height);
      const steps = Array.from({ length: 14 }, (_, i) => (i + 1) * height);
      const wanted = [y0 - 0.02, y0 + height, y1 - 0.02, y1 + height, ...steps];
      const bottom = wanted.find(free) ?? Math.min(0.99, Math.max(height, y0));
      taken.push({ left, width: wide(name), bottom });
      return { right, bottom };
    });
  }

  function shot(s, arm) {
    const out = s.outs[arm] || {};
    const kind = arm === base() ? "b" : "m";
    const frame = make("button", { type: "button", class: "shot", title: "click to change between baseline and method" });
    if (out.image !== null && out.image !== undefined) frame.append(make("img", { src: data.images[out.image], alt: `${label(arm)}: ${s.prompt}` }));
    else frame.append(make("span", { class: "gone" }, "not in this page"));
    if (state.boxes && knowsBoxes() && s.boxes) {
      const svg = draw("svg", { "aria-hidden": "true" });
      const labels = places(s.boxes);
      s.boxes.forEach(([name, x0, y0, x1, y1], i) => {
        const place = { x: `${100 * x0}%`, y: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%` };
        svg.append(draw("rect", { ...place, class: "under" }), draw("rect", place));
        const { right, bottom } = labels[i];
        const said = draw("text", { x: `${100 * (right ? x1 : x0)}%`, y: `${100 * bottom}%`, "text-anchor": right ? "end" : "start" });
        said.textContent = name;
        svg.append(said);
      });
      frame.append(svg);
    }
    const value = out.v === null || out.v === undefined ? "" : ` · ${figure(out.v)}`;
    const caption = make("figcaption", {}, make("span", { class: "name-arm" }, label(arm)), value, out.found ? make("span", { class: "soft" }, ` · ${out.found}`) : null);
    return make("figure", { class: kind }, frame, caption);
  }

  function pair(s) {
    let arm = state.swap ? state.arm : base();
    const node = make("div", { class: state.flip ? "pair single" : "pair" });
    const fill = () => {
      node.replaceChildren(...(state.flip ? [shot(s, arm)] : [shot(s, base()), shot(s, state.arm)]));
      for (const frame of node.querySelectorAll(".shot")) {
        if (!state.flip) { frame.disabled = true; frame.style.opacity = 1; continue; }
        frame.addEventListener("click", () => {
          arm = arm === base() ? state.arm : base();
          fill();
          node.querySelector(".shot").focus();
        });
      }
    };
    fill();
    return node;
  }

  function said(s) {
    const one = before(s).text ?? "", two = after(s).text ?? "";
    const parts = one !== two && one.includes(" ") ? difference(one, two) : null;
    const mark = (o) => (s.truth && ["yes", "no"].includes(s.truth) && o.v !== null && o.v !== undefined ? (o.v >= 1 ? " ✓" : " ✗") : "");
    return make("dl", { class: "said" },
      make("dt", {}, "baseline"), make("dd", {}, ...(parts ? parts[0] : [one || "(nothing)"]), mark(before(s))),
      make("dt", { class: "m" }, label(state.arm)), make("dd", {}, ...(parts ? parts[1] : [two || "(nothing)"]), mark(after(s))));
  }

  function card(s) {
    const found = after(s).state ?? "same";
    const sign = { gained: "▲ gained", lost: "▼ lost", changed: "● changed", same: "same" }[found];
    const word = (v) => (data.binary && v !== null && v !== undefined ? (v ? "yes" : "no") : number(v));
    const moved = before(s).v !== after(s).v ? `${data.name} ${word(before(s).v)} → ${word(after(s).v)} ` : "";
    const name = data.seeds > 1 ? `${s.id} · seed ${s.seed}` : s.id;
    const node = make("li", { class: `sample ${found}` },
      make("header", {}, make("span", { class: "id" }, name), make("span", { class: `chip ${found}`, title: data.figure }, `${moved}${sign}`)));
    if (s.image !== null && s.image !== undefined) node.append(make("img", { class: "scene", src: data.images[s.image], alt: "the image of this sample" }));
    node.append(prompt(s));
    if (s.truth && !before(s).p) node.append(make("p", { class: "truth" }, `right: ${s.truth}`));
    if (pictures) node.append(pair(s));
    if (s.choices && before(s).p) node.append(...choices(s));
    if (before(s).text !== undefined) node.append(said(s));
    return node;
  }

  function show() {
    let found = data.samples.filter((s) => is(s, state.only) && (!state.search || text(s).includes(state.search)));
    if (state.order === "change") found = found.map((s, i) => [change(s), i, s]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).map((x) => x[2]);
    const pages = Math.max(1, Math.ceil(found.length / SIZE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const part = found.slice(state.page * SIZE, (state.page + 1) * SIZE);
    $("cards").replaceChildren(...(part.length ? part.map(card) : [make("li", { class: "empty" }, "No sample is like that.")]));
    $("found").textContent = `${found.length} of ${data.samples.length} samples`;
    $("page").textContent = `${state.page + 1} of ${pages}`;
    document.querySelector(".pager").hidden = pages === 1;
    $("back").disabled = state.page === 0;
    $("next").disabled = state.page === pages - 1;
    for (const button of document.querySelectorAll("button[data-state]")) {
      const only = button.dataset.state;
      button.setAttribute("aria-pressed", String(only === state.only));
      button.querySelector(".count").textContent = data.samples.filter((s) => is(s, only)).length;
    }
    $("flip").setAttribute("aria-pressed", String(state.flip));
    $("swap").setAttribute("aria-pressed", String(state.swap));
    $("swap").disabled = !state.flip;
    $("boxes").setAttribute("aria-pressed", String(state.boxes));
    $("boxes").hidden = !knowsBoxes() || !data.samples.some((s) => s.boxes);
  }
  function set(values) { Object.assign(state, { page: 0 }, values); show(); }
  function turn(by) { state.page += by; show(); $("samples").scrollIntoView(); }

  for (const button of document.querySelectorAll("button[data-state]")) button.addEventListener("click", () => set({ only: button.dataset.state }));
  $("search").addEventListener("input", (e) => set({ search: e.target.value.trim().toLowerCase() }));
  $("order").addEventListener("change", (e) => set({ order: e.target.value }));
  for (const arm of data.arms) $("arm").append(make("option", { value: arm.id }, arm.label));
  $("arm").value = state.arm;
  $("arm").addEventListener("change", (e) => set({ arm: e.target.value }));
  $("arm-field").hidden = data.arms.length < 2;
  $("picture-tools").hidden = !pictures;
  $("flip").addEventListener("click", () => set({ flip: !state.flip, page: state.page }));
  $("swap").addEventListener("click", () => set({ swap: !state.swap, page: state.page }));
  $("boxes").addEventListener("click", () => set({ boxes: !state.boxes, page: state.page }));
  $("back").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  // Arrow keys turn pages while the keyboard is in this section and not in a field.
  $("samples").addEventListener("keydown", (e) => {
    if (e.target.matches("input, select") || e.altKey || e.ctrlKey || e.metaKey) return;
    if (e.key === "ArrowLeft" && !$("back").disabled) turn(-1);
    if (e.key === "ArrowRight" && !$("next").disabled) turn(1);
  });
  $("keys").hidden = !data.samples.some((s) => s.choices && before(s).p);
  // What changed is what one looks for first.
  if (data.samples.some((s) => is(s, "changed"))) state.only = "changed";
  document.querySelector(".tools").hidden = false;
  show();
})();
