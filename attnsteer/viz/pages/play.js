(() => {
  const about = JSON.parse($("data").textContent);
  const texts = about.kind !== "image";
  const state = { dial: about.dials[0], at: {}, marks: new Set(), heads: new Set(), scene: 0, image: "", shown: null, cell: [0, 0] };
  for (const d of about.dials) state.at[d.name] = d.start;
  $("name").textContent = about.name;
  const kinds = { lm: "language model", vlm: "vision-language model", image: "diffusion pipeline" };
  const count = about.sites.reduce((n, s) => n + s.heads, 0);
  $("line").append(kinds[about.kind], ` · ${about.sites.length} ${about.sites.length === 1 ? "site" : "sites"}, ${count} heads`);
  $("prompt").value = about.example;

  // The number of a dial, along its slider.
  const place = (d, v) => d.log ? 1000 * Math.log(v / d.low) / Math.log(d.high / d.low) : 1000 * (v - d.low) / (d.high - d.low);
  function valueAt(d, x) {
    let v = d.log ? d.low * (d.high / d.low) ** (x / 1000) : d.low + (d.high - d.low) * x / 1000;
    v = +v.toPrecision(3);
    // Off is a place that a hand can find.
    return Math.abs(x - place(d, d.off)) < 8 ? d.off : v;
  }
  const isOff = () => state.at[state.dial.name] === state.dial.off;
  function showDial() {
    const d = state.dial, v = state.at[d.name];
    $("method").value = d.name; $("about").textContent = d.about;
    $("value-name").textContent = d.parameter; $("value").value = place(d, v); $("value-shown").textContent = number(v);
    $("value").setAttribute("aria-valuetext", `${d.parameter} ${number(v)}`);
    const needs = [d.marks && !state.marks.size ? "mark some tokens first" : "", d.heads && !state.heads.size ? "choose heads first" : ""].filter(Boolean);
    $("waits").textContent = isOff() ? "Off: the model as it is." : needs.length ? `Nothing yet: ${needs.join(", ")}.` : state.shown && !state.shown.changed ? "It changed nothing at this value." : "";
    $("off").disabled = isOff();
  }

  const spans = () => {
    const every = [...state.marks].sort((a, b) => a - b), out = [];
    for (const i of every) if (out.length && out.at(-1)[1] === i) out.at(-1)[1] = i + 1; else out.push([i, i + 1]);
    return out;
  };
  const heads = () => [...state.heads].map((h) => h.split(".").map(Number));
  const asked = () => ({ prompt: $("prompt").value, method: state.dial.name, value: state.at[state.dial.name], spans: spans(), heads: heads(), scene: state.image ? null : state.scene, image: state.image });

  // One request at a time; of those that wait the last is sent.
  let running = false, waiting = null, changed = 0;
  async function post(body, signal) {
    const found = await fetch("run", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
    const kind = found.headers.get("Content-Type") || "";
    if (!kind.startsWith("application/json")) throw new Error(await found.text());
    const answer = await found.json();
    if (answer.error) throw Object.assign(new Error(answer.error), { stale: found.status === 409 });
    return answer;
  }
  function problem(text) { $("problem").hidden = !text; $("problem").textContent = text; }
  function ask() {
    changed ||= performance.now();
    if (running) { waiting = true; return; }
    running = true; waiting = null;
    const from = changed; changed = 0;
    $("state").textContent = "…";
    const before = performance.now();
    post(asked()).then((found) => {
      problem(""); state.shown = found; show(found);
      const took = Math.round(performance.now() - (from || before));
      $("state").textContent = `${took} ms`;
      document.documentElement.dataset.took = took;
    }).catch((error) => { problem(error instanceof TypeError ? "The server does not answer: is `attnsteer play` still running?" : error.message); $("state").textContent = ""; })
      .finally(() => { running = false; document.documentElement.dataset.answers = 1 + +(document.documentElement.dataset.answers || 0); if (waiting) ask(); });
  }

  function show(found) {
    buildStrip(found); paintStrip(found); drawGrid(); drawShot(found); showDial();
    const best = found.answers.reduce((a, b) => b.after > a.after ? b : a, found.answers[0]);
    const far = Math.max(...found.answers.flatMap((a) => [a.before, a.after]));
    bars($("answers"), found.answers.map((a) => [a.text, a.before, a.after, a === best]), far);
    const [x, y] = found.row, hidden = found.image ? [found.image[0], found.image[0] + found.image[1] * found.image[2]] : [0, 0];
    const order = [...x.keys()].filter((i) => i < hidden[0] || i >= hidden[1]).sort((i, j) => Math.max(x[j], y[j]) - Math.max(x[i], y[i])).slice(0, 7);
    const rows = order.map((i) => [`${found.tokens[i].trim() || "␣"}`, x[i], y[i], state.marks.has(i)]);
    if (found.image) { const sum = (l) => l.slice(...hidden).reduce((a, b) => a + b, 0); rows.unshift(["▦ picture", sum(x), sum(y), false]); }
    $("looks-card").hidden = false;
    bars($("looks"), rows, Math.max(...rows.flatMap((r) => [r[1], r[2]])));
    $("code").textContent = found.method;
  }
  function bars(list, rows, far) {
    while (list.children.length > rows.length) list.lastChild.remove();
    while (list.children.length < rows.length) list.append(make("li", {}, make("span", { class: "w" }), make("span", { class: "bars" }, make("i", { class: "was" }), make("i", { class: "now" })), make("span", { class: "v" })));
    rows.forEach(([text, x, y, top], k) => {
      const [w, b, v] = list.children[k].children;
      w.textContent = text.trim() || "␣"; w.title = text;
      b.children[0].style.width = `${100 * x / far}%`; b.children[1].style.width = `${100 * y / far}%`;
      v.replaceChildren(`${percent(x)} → `, make("b", {}, percent(y)));
      list.children[k].classList.toggle("best", top);
    });
  }

  // The prompt's tokens: press or draw over them to mark them.
  let built = "";
  const nodes = new Map();
  function buildStrip(found) {
    const key = JSON.stringify([found.tokens, found.image]);
    if (key === built) return;
    built = key;
    // Marks of another text say nothing of this one.
    for (const i of [...state.marks]) if (i >= found.tokens.length) state.marks.delete(i);
    nodes.clear();
    const [a, b] = found.image ? [found.image[0], found.image[0] + found.image[1] * found.image[2]] : [0, 0];
    $("strip").replaceChildren(...found.tokens.flatMap((t, i) => {
      if (i > a && i < b) return [];
      if (i === a && b > a) { const node = make("button", { class: "t", title: "all places of the picture" }, "▦ picture"); node.dataset.i = "image"; nodes.set("image", node); return [node]; }
      const node = make("button", { class: "t", "data-i": i, "aria-pressed": "false" }, t.trim() ? t.replace(/\n/g, "↵") : "␣");
      nodes.set(i, node);
      return [node];
    }));
    $("marking").hidden = false;
    $("mark-help").textContent = found.image ? "Press tokens, or draw over the picture, to mark them." : "Press or draw over tokens to mark them.";
  }
  const imagePlaces = () => { const g = state.shown?.image; return g ? Array.from({ length: g[1] * g[2] }, (_, k) => g[0] + k) : []; };
  function paintStrip(found) {
    const row = found.row[1], places = imagePlaces(), within = new Set(places);
    const far = Math.max(1e-6, ...row.filter((_, i) => !within.has(i)));
    for (const [i, node] of nodes) {
      const v = i === "image" ? places.reduce((s, k) => s + row[k], 0) : row[i];
      const tint = colourOf(ONE, Math.sqrt(Math.min(1, v / far)) * 0.85), on = i === "image" ? places.some((k) => state.marks.has(k)) : state.marks.has(i);
      node.style.background = css(tint); node.style.color = inkOn(tint);
      node.classList.toggle("marked", on); node.setAttribute("aria-pressed", String(on));
    }
  }
  const flip = (which, on) => { for (const i of which) if (on) state.marks.add(i); else state.marks.delete(i); if (state.shown) { paintStrip(state.shown); drawShot(state.shown); } showDial(); };
  let brush = null;
  const under = (e) => { const node = document.elementFromPoint(e.clientX, e.clientY)?.closest("#strip [data-i]"); return node ? node.dataset.i === "image" ? imagePlaces() : [+node.dataset.i] : null; };
  $("strip").addEventListener("pointerdown", (e) => { const which = under(e); if (!which) return; brush = !which.every((i) => state.marks.has(i)); flip(which, brush); });
  addEventListener("pointermove", (e) => { if (brush === null || e.pointerType === "touch") return; const which = under(e); if (which) flip(which, brush); });
  addEventListener("pointerup", () => { if (brush !== null) { brush = null; ask(); } });
  addEventListener("pointercancel", () => { brush = null; });
  $("strip").addEventListener("keydown", (e) => {
    if (e.key !== "Enter" && e.key !== " ") return;
    e.preventDefault();
    const i = e.target.dataset.i, which = i === "image" ? imagePlaces() : [+i];
    flip(which, !which.every((k) => state.marks.has(k))); ask();
  });
  $("clear").addEventListener("click", () => { flip([...state.marks], false); ask(); });

  // The picture and its places.
  function drawShot(found) {
    const box = $("shot-box");
    box.hidden = !found.picture;
    if (!found.picture) return;
    if ($("shot").getAttribute("src") !== found.picture) $("shot").src = found.picture;
    const canvas = $("places");
    if (!found.image) { canvas.width = canvas.height = 1; return; }
    const [first, h, w] = found.image, times = Math.max(4, Math.floor(240 / Math.max(h, w)));
    canvas.width = w * times; canvas.height = h * times;
    const context = canvas.getContext("2d"), row = found.row[1];
    let far = 1e-6;
    for (let i = 0; i < h * w; i++) far = Math.max(far, row[first + i]);
    for (let i = 0; i < h * w; i++) {
      const v = row[first + i] / far, x = (i % w) * times, y = Math.floor(i / w) * times;
      context.fillStyle = `rgba(${colourOf(HEAT, v).join(",")},${0.75 * v ** 0.8})`; context.fillRect(x, y, times, times);
      if (state.marks.has(first + i)) for (const [c, o] of [["#000", 1.5], ["#fff", 4]]) { context.strokeStyle = c; context.lineWidth = 2.5; context.strokeRect(x + o, y + o, times - 2 * o, times - 2 * o); }
    }
  }
  let painting = null;
  function placeAt(e) {
    const g = state.shown?.image, box = $("places").getBoundingClientRect();
    if (!g) return [];
    const i = clamp(Math.floor((e.clientY - box.top) / box.height * g[1]), 0, g[1] - 1), j = clamp(Math.floor((e.clientX - box.left) / box.width * g[2]), 0, g[2] - 1);
    return [g[0] + i * g[2] + j];
  }
  $("places").addEventListener("pointerdown", (e) => { const which = placeAt(e); if (!which.length) return; $("places").setPointerCapture(e.pointerId); painting = !state.marks.has(which[0]); flip(which, painting); });
  $("places").addEventListener("pointermove", (e) => { if (painting !== null) flip(placeAt(e), painting); });
  for (const over of ["pointerup", "pointercancel"]) $("places").addEventListener(over, () => { if (painting !== null) { painting = null; ask(); } });
  function scene(by) { state.image = ""; state.scene = clamp(state.scene + by, 0, about.scenes - 1); state.marks.clear(); $("scene-name").textContent = `scene ${state.scene}`; ask(); }
  if (about.kind === "vlm") {
    $("scene-tools").hidden = false;
    for (const id of ["scene-back", "scene-next", "scene-name"]) $(id).hidden = !about.scenes;
    $("scene-name").textContent = "scene 0";
    $("scene-back").addEventListener("click", () => scene(-1));
    $("scene-next").addEventListener("click", () => scene(1));
    $("file").addEventListener("change", (e) => {
      const file = e.target.files[0];
      if (!file) return;
      const reader = new FileReader();
      reader.onload = () => { state.image = reader.result; state.marks.clear(); $("scene-name").textContent = "own picture"; ask(); };
      reader.readAsDataURL(file);
    });
  }

  // Heads: colour by what changed, chosen ones framed.
  const most = Math.max(...about.sites.map((s) => s.heads));
  const grid = { left: 26, top: 18, cell: 20 };
  function drawGrid() {
    const box = $("grid").parentElement.clientWidth - 36;
    grid.cell = clamp(Math.floor((box - grid.left) / most), 7, 34);
    const c = grid.cell, gap = c >= 14 ? 2 : 1, context = fit($("grid"), grid.left + most * c + 2, grid.top + about.sites.length * c + 2);
    context.font = "11px ui-sans-serif, system-ui, sans-serif"; context.textBaseline = "middle"; context.fillStyle = styleOf("--soft");
    context.textAlign = "center";
    for (let h = 0; h < most; h += Math.max(1, Math.ceil(20 / c))) context.fillText(String(h), grid.left + (h + 0.5) * c, 9);
    context.textAlign = "right";
    for (let s = 0; s < about.sites.length; s += Math.max(1, Math.ceil(13 / c))) context.fillText(String(about.sites[s].layer), grid.left - 6, grid.top + (s + 0.5) * c);
    const change = state.shown?.change, far = change ? Math.max(1e-6, ...change.flat()) : 1;
    about.sites.forEach((entry, s) => {
      for (let h = 0; h < entry.heads; h++) {
        const x = grid.left + h * c, y = grid.top + s * c, v = change?.[s]?.[h] ?? 0;
        context.fillStyle = v > 0 ? css(colourOf(ONE, 0.1 + 0.8 * v / far)) : styleOf("--faint");
        context.fillRect(x, y, c - gap, c - gap);
        context.lineWidth = 2;
        if (state.heads.has(`${entry.layer}.${h}`)) { context.strokeStyle = styleOf("--query"); context.strokeRect(x, y, c - gap, c - gap); }
      }
    });
    if (document.activeElement === $("grid")) {
      context.strokeStyle = styleOf("--ink"); context.setLineDash([3, 2]);
      context.strokeRect(grid.left + state.cell[1] * c - 1, grid.top + state.cell[0] * c - 1, c - gap + 2, c - gap + 2); context.setLineDash([]);
    }
    said();
  }
  function said() {
    const which = state.heads.size ? `${state.heads.size} of ${count} heads chosen` : about.where;
    const [s, h] = state.cell, change = state.shown?.change?.[s]?.[h], mass = state.shown?.mass;
    const focus = document.activeElement === $("grid") || state.over ? ` · layer ${about.sites[s].layer}, head ${h}${change === undefined ? "" : `: its last row moved by ${percent(change)}`}${mass ? `, on the marks ${percent(mass[0][s][h])} → ${percent(mass[1][s][h])}` : ""}` : "";
    $("grid-said").textContent = `The method acts in ${which}. ${texts ? "Colour: how far the last token’s attention moved. " : ""}Press heads to choose them${focus || "."}`;
    $("all").disabled = !state.heads.size;
  }
  const cellAt = (e) => { const box = $("grid").getBoundingClientRect(); const h = Math.floor((e.clientX - box.left - grid.left) / grid.cell), s = Math.floor((e.clientY - box.top - grid.top) / grid.cell); return s >= 0 && s < about.sites.length && h >= 0 && h < about.sites[s].heads ? [s, h] : null; };
  function press(s, h) { const key = `${about.sites[s].layer}.${h}`; if (!state.heads.delete(key)) state.heads.add(key); drawGrid(); showDial(); if (texts) ask(); else move(); }
  $("grid").addEventListener("click", (e) => { const at = cellAt(e); if (at) { state.cell = at; press(...at); } });
  $("grid").addEventListener("pointermove", (e) => { const at = cellAt(e); state.over = !!at; if (at) state.cell = at; said(); });
  $("grid").addEventListener("pointerleave", () => { state.over = false; said(); });
  for (const event of ["focus", "blur"]) $("grid").addEventListener(event, drawGrid);
  $("grid").addEventListener("keydown", (e) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    if (move) { e.preventDefault(); const s = clamp(state.cell[0] + move[0], 0, about.sites.length - 1); state.cell = [s, clamp(state.cell[1] + move[1], 0, about.sites[s].heads - 1)]; drawGrid(); }
    if (e.key === "Enter" || e.key === " ") { e.preventDefault(); press(...state.cell); }
  });
  $("all").addEventListener("click", () => { state.heads.clear(); drawGrid(); showDial(); if (texts) ask(); else move(); });

  // Pictures of a pipeline: before above, after below, a column for each seed. While a dial moves they are previews; when it rests
  // whole pictures take their place, which the server gives up when it moves on.
  const REST = 350, client = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
  let turn = 0, previewing = false, again = false, moved = 0, last = 0, resting = 0, giving = null, drawn = "", cells = {};
  const fields = () => ({ first: clamp(+$("seed").value || 0, 0, 2e6), n: clamp(+$("seeds").value || 1, 1, about.seeds), steps: clamp(+$("steps").value || 20, 1, about.steps) });
  function next() { giving?.abort(); giving = new AbortController(); clearTimeout(resting); return ++turn; }
  function stale() { next(); again = false; $("state").textContent = "press Draw"; }
  function frames({ first, n, steps }) {
    const key = JSON.stringify([$("prompt").value, first, n, steps]);
    $("after-said")?.replaceChildren(`after: ${state.dial.name}(${state.dial.parameter}=${number(state.at[state.dial.name])})`);
    if (key === drawn) return;
    drawn = key; cells = { before: [], after: [] };
    $("pictures").style.gridTemplateColumns = `repeat(${n}, minmax(0, 1fr))`;
    $("pictures").replaceChildren();
    for (const side of ["before", "after"]) {
      $("pictures").append(side === "before" ? make("p", { class: "row" }, side) : make("p", { class: "row now", id: "after-said" }));
      for (let k = 0; k < n; k++) {
        const node = make("figure", {}, make("div", { class: "wait" }, "…"), make("span", { class: "tag", hidden: "" }), side === "after" ? make("figcaption", {}, `seed ${first + k}`) : null);
        cells[side].push(node); $("pictures").append(node);
      }
    }
    frames({ first, n, steps });
  }
  function put(found, k, seed) {
    const note = found.stage === "preview" ? `preview ${found.step}/${found.of}` : "";
    for (const side of ["before", "after"]) {
      const node = cells[side][k];
      node.firstChild.replaceWith(make("img", { src: found[side], alt: `${side}, seed ${seed}${note && `, ${note}`}` }));
      node.children[1].textContent = note; node.children[1].hidden = !note; node.classList.toggle("draft", !!note);
    }
    state.shown = found; $("code").textContent = found.method; showDial();
  }
  function told(error) {
    if (error.name === "AbortError" || error.stale) return;
    problem(error instanceof TypeError ? "The server does not answer: is `attnsteer play` still running?" : error.message); $("state").textContent = "";
  }
  const count1 = (name) => { const data = document.documentElement.dataset; data[name] = 1 + +(data[name] || 0); };
  function move() {
    last = performance.now(); moved ||= last; again = true;
    next();
    if (!previewing) preview();
  }
  async function preview() {
    const mine = turn, from = moved, { first, n, steps } = fields();
    moved = 0; again = false; previewing = true;
    frames({ first, n, steps }); problem(""); $("state").textContent = "…";
    const shape = drawn;
    try {
      for (let k = 0; k < n && mine === turn; k++) {
        const found = await post({ ...asked(), seed: first + k, steps, stage: "preview", client, turn: mine });
        if (found.why) { $("state").textContent = "no preview"; $("state").title = found.why; break; }
        // Shown also when the slider has moved on: the next one is asked for at once. Not where other pictures are wanted now.
        if (shape === drawn) put(found, k, first + k);
        const took = Math.round(performance.now() - from);
        $("state").textContent = `preview ${took} ms`;
        if (!k) document.documentElement.dataset.took = took;
        else if (k === n - 1) document.documentElement.dataset.all = took;
      }
    } catch (error) { told(error); }
    previewing = false; count1("previews");
    if (again) preview();
    else if (mine === turn) resting = setTimeout(draw, Math.max(0, REST - (performance.now() - last)));
  }
  async function draw() {
    const mine = next(), { first, n, steps } = fields(), { signal } = giving, from = last || performance.now();
    again = false;
    frames({ first, n, steps }); problem("");
    for (let k = 0; k < n; k++) {
      $("state").textContent = `drawing ${k + 1} of ${n}`;
      try {
        const found = await post({ ...asked(), seed: first + k, steps, stage: "picture", client, turn: mine }, signal);
        if (mine !== turn) return;
        put(found, k, first + k);
        $("state").textContent = `${found.ms} ms a seed`;
        if (!k) document.documentElement.dataset.whole = Math.round(performance.now() - from);
      } catch (error) { if (mine === turn) told(error); return; }
    }
    count1("answers");
  }

  // Controls.
  for (const d of about.dials) $("method").append(make("option", { value: d.name }, d.name));
  $("method").addEventListener("change", (e) => { state.dial = about.dials.find((d) => d.name === e.target.value); showDial(); if (texts) ask(); else move(); });
  $("value").addEventListener("input", (e) => { state.at[state.dial.name] = valueAt(state.dial, +e.target.value); showDial(); if (texts) ask(); else move(); });
  $("off").addEventListener("click", () => { state.at[state.dial.name] = state.dial.off; showDial(); if (texts) ask(); else move(); });
  let typing = 0;
  $("prompt").addEventListener("input", () => { if (!texts) return stale(); clearTimeout(typing); typing = setTimeout(() => { state.marks.clear(); ask(); }, 250); });
  addEventListener("resize", drawGrid);
  darkness.addEventListener("change", () => { ramps(); drawGrid(); if (texts && state.shown) paintStrip(state.shown); });
  showDial(); drawGrid();
  if (texts) ask();
  else {
    $("answer-title").textContent = "Pictures"; $("drawing").hidden = false;
    document.querySelector(".answer .minor").replaceChildren();
    $("pictures").after(make("p", { class: "legend" }, "While the slider moves, previews of one step (15/20: the 15th of 20): from the latent of the run as it is, with the method in that step alone. When it rests, whole pictures."));
    document.querySelector(".answer .bar").append(make("button", { class: "quiet", id: "draw", onclick: draw }, "Draw"));
    for (const id of ["steps", "seed", "seeds"]) $(id).addEventListener("change", stale);
    $("seeds").max = about.seeds; $("steps").max = about.steps;
    draw();
  }
})();
