(() => {
  const data = JSON.parse($("data").textContent);
  const P = Float32Array.from({ length: 256 }, (_, i) => (i / 255) ** 2);
  const arms = data.arms.length, two = arms === 2;
  const state = { arm: 0, frame: data.frames.length - 1, site: 0, head: 0, way: "row", row: 0, col: 0, colour: "" };
  const site = () => data.sites[state.site];
  const rows = () => data.axes[site().rows];
  const keys = () => data.axes[site().keys];
  const same = () => site().rows === site().keys;
  const places = (axis) => axis.grid ? [axis.grid[0], axis.grid[0] + axis.grid[1] * axis.grid[2]] : [0, 0];
  const inGrid = (axis, i) => { const [a, b] = places(axis); return i >= a && i < b; };
  const plain = (axis, i) => axis.words ? axis.words[i] : String(axis.numbers ? axis.numbers[i] : axis.first + i);
  function word(axis, i) {
    if (inGrid(axis, i)) { const at = i - axis.grid[0]; return `image ${Math.floor(at / axis.grid[2]) + 1},${(at % axis.grid[2]) + 1}`; }
    const text = plain(axis, i);
    return text.trim() === "" ? "␣" : text.replace(/\n/g, "↵").trim();
  }
  const inQuotes = (axis, i) => inGrid(axis, i) ? word(axis, i) : `“${word(axis, i)}”`;
  const most = Math.max(...data.sites.map((s) => s.heads.length));
  const name = (s, h) => `Layer ${data.sites[s].label}, head ${data.sites[s].heads[h]}`;

  // Small maps, and where those of a site begin.
  const offsets = [];
  data.sites.reduce((at, s) => { offsets.push(at); return at + s.heads.length * s.small[0] * s.small[1]; }, 0);
  const small = {};
  const smalls = (a, f) => small[`${a}-${f}`] ??= bytes($(`t-${a}-${f}`).textContent);

  // Large ones, read when they are looked at.
  const held = new Map();
  const ready = new Promise((done) => document.readyState === "loading" ? addEventListener("DOMContentLoaded", done) : done());
  async function whole(kind, a, f, s) {
    const id = `${kind}-${a}-${f}-${s}`;
    if (!held.has(id)) {
      let node = $(id);
      // The element may be in the middle of being parsed.
      if (document.readyState === "loading") { await ready; node = $(id); }
      held.set(id, node === null ? null : kind === "m" ? inflate(bytes(node.textContent)) : bytes(node.textContent));
      // Some tens of megabytes at most.
      if (held.size > 12) held.delete(held.keys().next().value);
    }
    return held.get(id);
  }

  // The overview.
  const grid = { canvas: $("grid"), left: 0, top: 20, cell: 0 };
  const column = () => data.readings.find((r) => `${r.group}/${r.name}` === state.colour);
  function valuesOf(reading, s, arm = state.arm) {
    const of = (a) => (reading.values[Math.min(a, reading.values.length - 1)] || [])[s];
    if (arm === "change" && reading.values.length === 2 && reading.name !== "change") {
      const [x, y] = [of(0), of(1)];
      return x && y ? x.map((v, h) => v === null || y[h] === null ? null : y[h] - v) : null;
    }
    return of(arm === "change" ? 0 : arm) || null;
  }
  function range(reading) {
    const every = data.sites.flatMap((_, s) => valuesOf(reading, s) || []).filter((v) => v !== null);
    let low = Math.min(...every), high = Math.max(...every);
    const both = low < 0 && high > 0 || (state.arm === "change" && reading.values.length === 2 && reading.name !== "change");
    if (both) { high = Math.max(-low, high) || 1; low = -high; }
    return { low, high: high > low ? high : low + 1, both, none: !every.length };
  }
  function drawGrid() {
    const box = $("gridbox").clientWidth, labels = Math.max(...data.sites.map((s) => s.label.length));
    grid.left = 10 + 6.6 * labels;
    grid.cell = clamp(Math.floor((box - grid.left) / most), 7, data.sites.length > 9 ? 40 : 56);
    const gap = grid.cell >= 14 ? 2 : 1, c = grid.cell;
    const context = fit(grid.canvas, grid.left + most * c, grid.top + data.sites.length * c);
    context.fillStyle = styleOf("--soft");
    context.font = "11px ui-sans-serif, system-ui, sans-serif";
    context.textBaseline = "middle";
    const every = (size, need) => Math.max(1, Math.ceil(need / size));
    context.textAlign = "center";
    for (let h = 0; h < most; h += every(c, 20)) context.fillText(String(h), grid.left + (h + 0.5) * c, 10);
    context.textAlign = "right";
    for (let s = 0; s < data.sites.length; s += every(c, 13)) context.fillText(data.sites[s].label, grid.left - 6, grid.top + (s + 0.5) * c);
    const reading = column(), change = state.arm === "change";
    const faint = styleOf("--faint");
    const limits = reading ? range(reading) : null;
    const one = reading ? null : change ? [smalls(0, state.frame), smalls(1, state.frame)] : [smalls(state.arm, state.frame)];
    context.imageSmoothingEnabled = false;
    data.sites.forEach((entry, s) => {
      const values = reading ? valuesOf(reading, s) : null;
      entry.heads.forEach((_, h) => {
        const x = grid.left + h * c, y = grid.top + s * c, size = c - gap;
        if (reading) {
          const v = values ? values[h] : null;
          context.fillStyle = v === null ? faint : css(colourOf(limits.both ? TWO : ONE, limits.both ? 0.5 + v / limits.high / 2 : 0.06 + 0.94 * (v - limits.low) / (limits.high - limits.low)));
          context.fillRect(x, y, size, size);
          return;
        }
        const [n, m] = entry.small, at = offsets[s] + h * n * m;
        const value = change
          ? (i, j) => { const k = at + i * m + j, d = P[one[1][k]] - P[one[0][k]]; return Math.round(127.5 + 127.5 * Math.sign(d) * Math.sqrt(Math.abs(d))); }
          : (i, j) => one[0][at + i * m + j];
        const far = change ? (v) => Math.abs(v - 127.5) : null;
        const scale = window.devicePixelRatio || 1;
        context.drawImage(raster(n, m, Math.round(size * scale), Math.round(size * scale), value, change ? TWO : ONE, far), x, y, size, size);
      });
    });
    const legend = $("grid-legend");
    legend.replaceChildren();
    if (!reading) legend.append(change ? "Each square is one head: what its map gained and lost, the largest change of each place." : "Each square is one head’s map: rows downwards, keys across, on its own scale.");
    else if (limits.none) legend.append(reading.about);
    else legend.append(reading.about, make("br"), number(limits.low), scaleBar(limits.both ? TWO : ONE), number(limits.high));
    place();
  }
  function scaleBar(lut) {
    const stops = Array.from({ length: 9 }, (_, i) => css(colourOf(lut, i / 8))).join(",");
    return make("span", { class: "scale", style: `background:linear-gradient(90deg,${stops})` });
  }
  function place() {
    const gap = grid.cell >= 14 ? 2 : 1;
    Object.assign($("cursor").style, { left: `${grid.left + state.head * grid.cell - 2}px`, top: `${grid.top + state.site * grid.cell - 2}px`, width: `${grid.cell - gap + 4}px`, height: `${grid.cell - gap + 4}px` });
    $("cursor").hidden = false;
  }
  grid.canvas.addEventListener("click", (e) => {
    const at = grid.canvas.getBoundingClientRect();
    const h = Math.floor((e.clientX - at.left - grid.left) / grid.cell), s = Math.floor((e.clientY - at.top - grid.top) / grid.cell);
    if (s >= 0 && s < data.sites.length) choose(s, clamp(h, 0, data.sites[s].heads.length - 1));
  });
  grid.canvas.addEventListener("keydown", (e) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    if (!move) return;
    e.preventDefault();
    const s = clamp(state.site + move[0], 0, data.sites.length - 1);
    choose(s, clamp(state.head + move[1], 0, data.sites[s].heads.length - 1));
  });

  // Which head, row and key.
  function choose(s, h) {
    const other = data.sites[s], was = site();
    state.site = s; state.head = h;
    if (was.rows !== other.rows || was.keys !== other.keys) start();
    showHead();
  }
  function turn(by) {
    const flat = data.sites.flatMap((x, s) => x.heads.map((_, h) => [s, h]));
    const at = flat.findIndex(([s, h]) => s === state.site && h === state.head);
    choose(...flat[(at + by + flat.length) % flat.length]);
  }
  // Where the look begins: the last row; of a picture's rows over words, a word.
  function start() {
    const [r, k] = [rows(), keys()];
    const words = k.words ? k.words.map((w, i) => [w, i]).filter(([w, i]) => /^\s*\p{L}/u.test(w) && !/^\s*(a|an|the|and|of|in|on|with)\s*$/i.test(w) && !inGrid(k, i)) : [];
    Object.assign(state, { row: r.n - 1, col: 0, way: "row" });
    if (r.grid && r.n === r.grid[1] * r.grid[2]) state.row = Math.floor(r.grid[1] / 2) * r.grid[2] + Math.floor(r.grid[2] / 2);
    if (r.grid && words.length && site().kind !== "self") Object.assign(state, { way: "col", col: words.at(-1)[1] });
  }

  // The map of the chosen head: values in 0..255 by row and key.
  let shown = null;
  async function load() {
    const { site: s, head: h, frame: f } = state, n = rows().n, m = keys().n;
    const wanted = state.arm === "change" ? [0, 1] : [state.arm];
    // Its partner is read too, for the figures beside.
    const all = two ? [0, 1] : wanted;
    const parts = await Promise.all(all.map((a) => whole("m", a, f, s)));
    if (s !== state.site || h !== state.head || f !== state.frame) return null;
    const own = parts.map((p) => p.subarray(h * n * m, (h + 1) * n * m));
    return { n, m, own, arm: (a) => own[two ? a : 0], s, h, f };
  }
  const p = (a, i, j) => P[shown.arm(a)[i * shown.m + j]];
  const line = (a, way, at) => way === "row" ? Float32Array.from({ length: shown.m }, (_, j) => p(a, at, j)) : Float32Array.from({ length: shown.n }, (_, i) => p(a, i, at));
  const current = () => state.arm === "change" ? 1 : state.arm;

  const map = { left: 0, top: 0, w: 0, h: 0 };
  function drawMap() {
    const { n, m } = shown, box = $("mapbox").clientWidth, r = rows(), k = keys();
    const roomy = (size, count, need) => size / count >= need;
    // Places of a picture have one name together.
    const named = (axis) => textual(axis) ? Array.from({ length: axis.n }, (_, i) => i).filter((i) => !inGrid(axis, i)) : [];
    const widest = (axis) => Math.max(0, ...named(axis).map((i) => Math.min(12, word(axis, i).length)));
    const tall = clamp(box, 200, 700);
    let left = 0, top = 0, high = clamp(tall * Math.min(1, (n / m)), Math.min(n * 26, 44), tall);
    if (n > m) high = tall;
    if (r.grid) left = 18;
    if (roomy(high, n, 8.6) && n > 1) left = Math.max(left, Math.min(box * 0.24, 10 + 6.1 * widest(r)));
    let wide = box - left;
    if (n === m) wide = high = Math.min(wide, high);
    if (n <= m && n > 1 && wide / m > 26) { wide = Math.min(wide, m * 40); high = n * Math.min(40, wide / m); }
    if (n > m) wide = Math.min(wide, Math.max(m * (tall / n), Math.min(wide, m * 26)));
    if (k.grid) top = 18;
    const [sides, heads] = [roomy(high, n, 8.6) && n > 1, roomy(wide, m, 9.4)];
    if (heads) top = Math.max(top, 10 + 5.2 * widest(k));
    // Room for what leans over the right edge.
    const lean = heads ? Math.min(top * 0.75, 44) : 0;
    if (left + wide + lean > box) { const less = (box - left - lean) / wide; wide *= less; if (n === m) high *= less; }
    Object.assign(map, { left, top, w: wide, h: high });
    const context = fit($("map"), left + wide + lean, top + high);
    const scale = window.devicePixelRatio || 1, px = [Math.round(high * scale), Math.round(wide * scale)];
    let picture, limits;
    if (state.arm === "change") {
      const a = shown.arm(0), b = shown.arm(1);
      let far = 1e-6;
      for (let i = 0; i < n * m; i++) { const d = Math.abs(P[b[i]] - P[a[i]]); if (d > far) far = d; }
      picture = raster(n, m, ...px, (i, j) => { const d = P[b[i * m + j]] - P[a[i * m + j]]; return Math.round(127.5 + 127.5 * Math.sign(d) * Math.sqrt(Math.abs(d) / far)); }, TWO, (v) => Math.abs(v - 127.5));
      limits = ["−" + percent(far), scaleBar(TWO), "+" + percent(far)];
    } else {
      const own = shown.arm(state.arm);
      let highest = 1;
      for (const part of shown.own) for (let i = 0; i < n * m; i++) if (part[i] > highest) highest = part[i];
      picture = raster(n, m, ...px, (i, j) => Math.round(own[i * m + j] * 255 / highest), ONE);
      limits = ["0", scaleBar(ONE), percent(P[highest])];
    }
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, left, top, wide, high);
    context.strokeStyle = styleOf("--rule");
    context.lineWidth = 1;
    context.strokeRect(left + 0.5, top + 0.5, wide - 1, high - 1);
    context.fillStyle = styleOf("--soft");
    const size = (c) => clamp(c * 0.85, 8.5, 12);
    const cut = (text) => text.length > 12 ? text.slice(0, 11) + "…" : text;
    const font = (px) => { context.font = `${px}px ui-sans-serif, system-ui, sans-serif`; context.textBaseline = "middle"; };
    if (sides) {
      font(size(high / n)); context.textAlign = "right";
      for (const i of named(r)) context.fillText(cut(word(r, i)), left - 5, top + (i + 0.5) * high / n, left - 6);
    }
    if (heads) {
      font(size(wide / m)); context.textAlign = "left";
      for (const j of named(k)) {
        context.save();
        context.translate(left + (j + 0.5) * wide / m, top - 4);
        context.rotate(-Math.PI / 3.2);
        context.fillText(cut(word(k, j)), 0, 0, top * 1.15);
        context.restore();
      }
    }
    const bracket = (axis, size, count) => { const [a, b] = places(axis); return [a / count * size + 1, b / count * size - 1]; };
    context.strokeStyle = styleOf("--soft");
    font(11); context.textAlign = "center";
    if (r.grid) {
      const [a, b] = bracket(r, high, n);
      context.beginPath(); context.moveTo(left - 4.5, top + a); context.lineTo(left - 4.5, top + b); context.stroke();
      context.save(); context.translate(left - 12, top + (a + b) / 2); context.rotate(-Math.PI / 2); context.fillText("picture, row by row", 0, 0, b - a); context.restore();
    }
    if (k.grid) {
      const [a, b] = bracket(k, wide, m);
      context.beginPath(); context.moveTo(left + a, top - 4.5); context.lineTo(left + b, top - 4.5); context.stroke();
      context.fillText("picture, row by row", left + (a + b) / 2, top - 12, b - a);
    }
    const legend = $("map-legend");
    legend.replaceChildren(`Rows look at keys. `, ...limits, data.kept ? ` Of each row the ${data.kept.keys} strongest keys are kept, on average ${percent(data.kept.share)} of it.` : "");
    drawCross();
  }
  function drawCross() {
    const canvas = $("cross"), { left, top, w, h } = map, context = fit(canvas, left + w, top + h), { n, m } = shown;
    context.strokeStyle = styleOf("--query");
    const y = top + state.row * h / n, x = left + state.col * w / m, ch = Math.max(h / n, 2), cw = Math.max(w / m, 2);
    context.lineWidth = 1.5;
    if (state.way === "row") context.strokeRect(left + 0.75, y - 0.25, w - 1.5, ch);
    else context.strokeRect(x - 0.25, top + 0.75, cw, h - 1.5);
    context.lineWidth = 2;
    context.strokeRect(x - 1, y - 1, cw + 1.5, ch + 1.5);
  }
  function pointed(e, canvas, area, n, m) {
    const at = canvas.getBoundingClientRect();
    return [clamp(Math.floor((e.clientY - at.top - area.top) / area.h * n), 0, n - 1), clamp(Math.floor((e.clientX - at.left - area.left) / area.w * m), 0, m - 1)];
  }
  function drags(node, found) {
    let down = false;
    node.addEventListener("pointerdown", (e) => { down = true; node.setPointerCapture(e.pointerId); found(e); });
    node.addEventListener("pointermove", (e) => { if (down) found(e); });
    for (const over of ["pointerup", "pointercancel"]) node.addEventListener(over, () => { down = false; });
  }
  drags($("map"), (e) => { if (!shown) return; [state.row, state.col] = pointed(e, $("map"), map, shown.n, shown.m); look(); });
  $("map").addEventListener("keydown", (e) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    if (!move || !shown) return;
    e.preventDefault();
    state.row = clamp(state.row + move[0], 0, shown.n - 1);
    state.col = clamp(state.col + move[1], 0, shown.m - 1);
    look();
  });

  // Tokens. A picture's places are one word among them.
  const strips = { strip: null, other: null };
  function buildStrip(id, axis, click) {
    if (strips[id] && strips[id].axis === axis) return;
    const nodes = new Map();
    const box = $(id);
    box.replaceChildren();
    const [a, b] = places(axis);
    for (let i = 0; i < axis.n; i++) {
      if (i === a && b > a) {
        const node = make("button", { class: "t", title: "the picture's places" }, "▦ picture");
        nodes.set("image", node); box.append(node);
        i = b - 1; continue;
      }
      const text = plain(axis, i);
      const node = make("button", { class: "t", "data-i": i, tabindex: -1 }, text.trim() === "" ? "␣" : text.replace(/\n/g, "↵"));
      nodes.set(i, node); box.append(node);
    }
    box.onclick = (e) => { const at = e.target.closest("[data-i]"); if (at) click(+at.dataset.i); };
    strips[id] = { axis, nodes };
  }
  const textual = (axis) => !axis.grid || axis.n > places(axis)[1] - places(axis)[0];
  function paint(id, shares, far, marked, faded) {
    const entry = strips[id];
    if (!entry) return;
    const [a, b] = places(entry.axis), change = state.arm === "change";
    for (const [i, node] of entry.nodes) {
      let v = 0;
      if (shares) { if (i !== "image") v = shares[i];
        // Shares of one row add up; those of many rows do not, so the largest is said.
        else for (let k = a; k < b; k++) v = state.way === "row" ? v + shares[k] : Math.abs(shares[k]) > Math.abs(v) ? shares[k] : v;
      }
      const tint = change ? colourOf(TWO, 0.5 + Math.sign(v) * Math.sqrt(Math.min(1, Math.abs(v) / far)) / 2) : colourOf(ONE, Math.sqrt(Math.min(1, v / far)));
      node.style.background = shares ? css(tint) : "";
      node.style.color = shares ? inkOn(tint) : "";
      node.classList.toggle("at", i === marked || (i === "image" && marked >= a && marked < b));
      node.classList.toggle("away", !!faded && i !== "image" && faded(i));
      if (i === "image") node.textContent = shares ? `▦ picture ${state.way === "row" ? "" : "up to "}${change ? signed(v) : percent(v)}` : "▦ picture";
    }
  }
  function look() {
    if (!shown) return;
    const r = rows(), k = keys(), way = state.way, at = way === "row" ? state.row : state.col;
    const from = way === "row" ? r : k, to = way === "row" ? k : r;
    const lines = [0, two ? 1 : 0].map((a) => line(a, way, at));
    const change = state.arm === "change";
    const shares = change ? lines[1].map((v, i) => v - lines[0][i]) : lines[current()];
    const text = [...shares.keys()].filter((i) => !inGrid(to, i));
    const far = Math.max(1e-6, ...text.map((i) => Math.abs(shares[i])));
    // Strips: one where rows and keys are the same tokens, else rows and keys apart.
    const click = (w) => (i) => { if (w === "either") { if (state.way === "row") state.row = i; else state.col = i; } else { state[w] = i; state.way = w; } settle(); look(); };
    if (same() && textual(r)) {
      buildStrip("strip", r, click("either")); $("other").replaceChildren(); strips.other = null;
      $("strip-title").textContent = way === "row" ? "Press a token: what does it look at?" : "Press a token: who looks at it?"; $("other-title").textContent = "";
      const seen = way === "row" ? lines.some((l) => l.at(-1) > 0) ? null : (i) => lines.every((l) => l[i] === 0) && i > state.row : null;
      paint("strip", shares, far, at, seen);
    } else {
      for (const [id, axis, w, label] of [["strip", r, "row", "Rows (queries)"], ["other", k, "col", "Keys"]]) {
        if (textual(axis)) { buildStrip(id, axis, click(w)); $(`${id}-title`).textContent = label; } else { $(id).replaceChildren(); strips[id] = null; $(`${id}-title`).textContent = ""; }
        if (strips[id]) paint(id, axis === to ? shares : null, far, w === "row" ? state.row : state.col);
      }
    }
    for (const node of $("ways").children) node.setAttribute("aria-pressed", String(node.dataset.way === way));
    tops(to, lines, shares);
    drawPicture(way, from, to, at, shares);
    const here = [0, two ? 1 : 0].map((a) => p(a, state.row, state.col));
    $("said").replaceChildren(make("b", {}, inQuotes(r, state.row)), " → ", make("b", {}, inQuotes(k, state.col)), "  ",
      two ? `${percent(here[0])} → ${percent(here[1])}` : percent(here[0]));
    drawCross();
    drawPlane();
  }
  // The other side of the chosen row or key: where most of it goes.
  function settle() {
    const shares = line(current(), state.way, state.way === "row" ? state.row : state.col);
    let best = 0;
    shares.forEach((v, i) => { if (v > shares[best]) best = i; });
    if (state.way === "row") state.col = best; else state.row = best;
  }
  function tops(to, lines, shares) {
    const order = [...shares.keys()].sort((i, j) => Math.abs(shares[j]) - Math.abs(shares[i])).slice(0, 6).filter((i) => shares[i] !== 0);
    const far = Math.max(1e-6, ...order.flatMap((i) => lines.map((l) => l[i])));
    $("tops").replaceChildren(...order.map((i) => make("li", {}, make("span", { class: "w", title: word(to, i) }, make("bdi", {}, word(to, i)), inGrid(to, i) ? null : make("small", {}, ` ${to.numbers ? to.numbers[i] : to.first + i}`)),
      make("span", { class: "bars" }, two ? bar(lines[0][i] / far, "was") : null, bar((two ? lines[1] : lines[0])[i] / far, "")),
      make("span", { class: "v" }, state.arm === "change" ? signed(shares[i]) : percent(shares[i])))));
  }
  const bar = (share, kind) => make("i", { class: kind, style: `width:${(100 * share).toFixed(1)}%` });
  for (const node of $("ways").children) node.addEventListener("click", () => {
    // What was chosen stays chosen: the same token, the other way round.
    if (same()) { if (node.dataset.way === "col" && state.way === "row") state.col = state.row; if (node.dataset.way === "row" && state.way === "col") state.row = state.col; }
    state.way = node.dataset.way; settle(); look();
  });

  // The picture, with what falls on its places.
  function drawPicture(way, from, to, at, shares) {
    const over = to.grid ? to : from.grid ? from : null;
    $("picture").hidden = !over;
    if (!over) return;
    const [first, h, w] = over.grid, image = data.images[Math.min(current(), data.images.length - 1)];
    const shot = $("shot");
    shot.hidden = !image; shot.parentElement.classList.toggle("blank", !image);
    if (!image) shot.parentElement.style.aspectRatio = `${w} / ${h}`;
    if (image && shot.getAttribute("src") !== image) shot.src = image;
    const canvas = $("heat"), times = Math.max(1, Math.ceil(320 / Math.max(h, w)));
    canvas.width = w * times; canvas.height = h * times;
    const context = canvas.getContext("2d");
    const change = state.arm === "change";
    if (to.grid) {
      let far = 1e-9, sum = 0;
      for (let i = 0; i < h * w; i++) { far = Math.max(far, Math.abs(shares[first + i])); sum += shares[first + i]; }
      for (let i = 0; i < h * w; i++) {
        const v = shares[first + i] / far;
        const tone = change ? colourOf(TWO, 0.5 + Math.sign(v) * Math.sqrt(Math.abs(v)) / 2) : colourOf(HEAT, Math.abs(v));
        context.fillStyle = `rgba(${tone.join(",")},${(image ? 0.85 : 1) * Math.pow(Math.abs(v), 0.7)})`;
        context.fillRect((i % w) * times, Math.floor(i / w) * times, times, times);
      }
      const of = way === "row" ? `${inQuotes(from, at)} looks at the picture: ` : `who looks at ${inQuotes(from, at)}: `;
      $("heat-legend").textContent = way === "row" ? of + (change ? signed(sum) : `${percent(sum)} in all, ${percent(far)} at most`) : of + (change ? `up to ${percent(far)} of a place’s attention, more or less` : `up to ${percent(far)} of a place’s attention`);
    } else $("heat-legend").textContent = "Press a place: what does it look at?";
    // The chosen place.
    if (inGrid(from, at)) {
      const i = at - from.grid[0];
      context.lineWidth = Math.max(2, times / 6);
      for (const [colour, out] of [["#000", 0], ["#fff", context.lineWidth]]) { context.strokeStyle = colour; context.strokeRect((i % w) * times + out / 2, Math.floor(i / w) * times + out / 2, times - out, times - out); }
    }
  }
  drags($("heat"), (e) => {
    if (!shown) return;
    const [r, k] = [rows(), keys()], axis = r.grid ?? k.grid, box = $("heat").getBoundingClientRect();
    const [first, h, w] = axis, i = clamp(Math.floor((e.clientY - box.top) / box.height * h), 0, h - 1), j = clamp(Math.floor((e.clientX - box.left) / box.width * w), 0, w - 1);
    if (r.grid) { state.row = first + i * w + j; state.way = "row"; } else { state.col = first + i * w + j; state.way = "col"; }
    settle(); look();
  });

  // Queries and keys in one plane.
  async function drawPlane() {
    const f = state.frame, s = state.site, h = state.head, a = two ? current() : 0, about = data.planes[`${a}-${f}-${s}`];
    $("plane-card").hidden = !about;
    if (!about) return;
    const points = await whole("p", a, f, s);
    if (!points || s !== state.site || h !== state.head) return;
    const [q, k] = [about.queries, about.keys], count = q.length + k.length, base = h * count * 2;
    const side = Math.min(544, $("plane").parentElement.clientWidth), high = Math.round(side * 0.72), context = fit($("plane"), side, high);
    const at = (i) => [14 + points[base + 2 * i] / 255 * (side - 28), 14 + (1 - points[base + 2 * i + 1] / 255) * (high - 28)];
    const [one, two_] = [styleOf("--query"), styleOf("--key")];
    const few = count <= 90;
    const numbersOf = (axis) => (i) => axis.numbers ? axis.numbers[i] : axis.first + i;
    const draw = (i, square, colour, size, alpha) => {
      const [x, y] = at(i);
      context.globalAlpha = alpha; context.fillStyle = colour; context.beginPath();
      if (square) context.rect(x - size, y - size, 2 * size, 2 * size); else context.arc(x, y, size, 0, 7);
      context.fill(); context.globalAlpha = 1;
    };
    const size = few ? 3.6 : 2.4;
    k.forEach((_, i) => draw(q.length + i, true, two_, size, 0.55));
    q.forEach((_, i) => draw(i, false, one, size, 0.55));
    // Lines from the chosen query to the keys that it looks at most.
    const mine = q.indexOf(state.row);
    if (mine >= 0 && shown) {
      const shares = line(a, "row", state.row);
      const best = k.map((j, i) => [shares[j] ?? 0, i]).sort((x, y) => y[0] - x[0]).slice(0, 5).filter(([v]) => v > 0.01);
      context.strokeStyle = styleOf("--ink");
      for (const [v, i] of best) { context.globalAlpha = 0.25 + 0.6 * v; context.lineWidth = 0.8 + 4 * v; context.beginPath(); context.moveTo(...at(mine)); context.lineTo(...at(q.length + i)); context.stroke(); }
      context.globalAlpha = 1;
      draw(mine, false, one, size + 3, 1);
      context.font = "12px ui-sans-serif, system-ui, sans-serif";
      const taken = [];
      const label = (i, text, colour) => {
        const [x, y] = at(i), wide = context.measureText(text).width;
        for (const [dx, dy] of [[9, 4], [-9 - wide, 4], [-wide / 2, -9], [-wide / 2, 17], [9, -9], [9, 17], [-9 - wide, -9], [-9 - wide, 17]]) {
          const box = [clamp(x + dx, 2, side - wide - 2), clamp(y + dy, 12, high - 4)];
          if (taken.some(([a0, b0, w0]) => box[0] < a0 + w0 + 3 && box[0] + wide + 3 > a0 && Math.abs(box[1] - b0) < 13)) continue;
          taken.push([...box, wide]);
          context.lineWidth = 3; context.strokeStyle = styleOf("--paper"); context.strokeText(text, ...box);
          context.fillStyle = colour; context.fillText(text, ...box);
          return;
        }
      };
      label(mine, word(rows(), state.row), one);
      for (const [, i] of best) { draw(q.length + i, true, two_, size + 1.5, 1); label(q.length + i, word(keys(), k[i]), two_); }
    }
    const [factor, correlation, share] = about.about[h];
    $("plane-about").textContent = `· near means a high score: correlation of distance and score ${number(correlation)}; the plane holds ${percent(share)} of the variance${count < shown.n + shown.m ? `; ${q.length} and ${k.length} of them` : ""}`;
  }

  // Readings.
  function drawReadings() {
    const body = $("readings").tBodies[0];
    body.replaceChildren(...data.readings.flatMap((r, place) => {
      const key = `${r.group}/${r.name}`;
      const kind = r.group === data.readings[place - 1]?.group ? null : make("tr", { class: "kind" }, make("th", { colspan: 3 }, r.group === "head_profile" ? "head_profile, over inputs" : "of these maps"));
      const own = valuesOf(r, state.site), v = own ? own[state.head] : null;
      const every = data.sites.flatMap((_, s) => valuesOf(r, s) || []).filter((x) => x !== null);
      const [low, high] = [Math.min(...every), Math.max(...every)], at = (x) => `left:${(100 * clamp((x - low) / (high - low || 1), 0, 1)).toFixed(1)}%`;
      const rank = v === null ? null : 1 + every.filter((x) => x > v).length;
      const chance = r.chance?.[state.site]?.[state.head];
      const track = make("div", { class: "track", title: v === null ? "" : `${number(low)} to ${number(high)} over all heads` }, v === null ? null : make("i", { style: at(v) }), chance === null || chance === undefined ? null : make("u", { style: at(chance), title: `chance ${number(chance)}` }));
      return [...(kind ? [kind] : []), make("tr", { class: key === state.colour ? "on" : "", title: r.about, onclick: () => recolour(key === state.colour ? "" : key) },
        make("th", { scope: "row" }, make("button", {}, r.name.replaceAll("_", " "))), make("td", { class: "n" }, number(v), rank ? make("span", { class: "soft" }, ` ${rank} of ${every.length}`) : null), make("td", {}, track))];
    }));
  }
  function recolour(key) { state.colour = key; $("colour").value = key; drawGrid(); drawReadings(); }

  // All of the chosen head.
  async function showHead() {
    place();
    $("where").textContent = name(state.site, state.head);
    $("site").value = String(state.site);
    $("head-number").replaceChildren(...site().heads.map((h, i) => make("option", { value: i }, `head ${h}`)));
    $("head-number").value = String(state.head);
    drawReadings();
    const found = await load();
    if (!found) return;
    shown = found;
    $("look-title").textContent = textual(rows()) || textual(keys()) ? rows().grid || keys().grid ? "Words and picture" : "Tokens" : "Picture";
    drawMap();
    settle();
    look();
    for (const id of ["strip", "other"]) { const node = $(id).querySelector(".at"); if (node) $(id).scrollTop = node.offsetTop - $(id).offsetTop - $(id).clientHeight / 2; }
    document.documentElement.dataset.shown = `${state.site}.${state.head}.${state.arm}`;
  }

  // Controls.
  $("facts").append(...data.facts.flatMap(([k, v], i) => [i ? " · " : "", k ? make("b", {}, `${k} `) : "", v]));
  const kinds = [...data.arms.map((label, a) => [a, label]), ["change", "change"]];
  if (two) {
    $("arms").hidden = false;
    for (const [a, label] of kinds) $("arms").append(make("button", { "data-arm": a, "aria-pressed": String(a === 0), onclick: () => setArm(a) }, label));
  }
  function setArm(a) {
    state.arm = a;
    for (const node of $("arms").children) node.setAttribute("aria-pressed", String(node.dataset.arm === String(a)));
    drawGrid(); showHead();
  }
  $("frame-field").hidden = data.frames.length < 2;
  $("frame").max = data.frames.length - 1; $("frame").value = state.frame;
  const frameName = () => { $("frame-name").textContent = data.frames[state.frame].replace("step ", ""); };
  frameName();
  $("frame").addEventListener("input", (e) => { state.frame = +e.target.value; frameName(); drawGrid(); showHead(); });
  data.sites.forEach((s, i) => $("site").append(make("option", { value: i, title: s.path }, `layer ${s.label}`)));
  $("site").addEventListener("change", (e) => { const s = +e.target.value; choose(s, Math.min(state.head, data.sites[s].heads.length - 1)); });
  $("head-number").addEventListener("change", (e) => choose(state.site, +e.target.value));
  $("back").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("colour").append(make("option", { value: "" }, "maps"));
  for (const group of [...new Set(data.readings.map((r) => r.group))]) {
    $("colour").append(make("optgroup", { label: group }, ...data.readings.filter((r) => r.group === group).map((r) => make("option", { value: `${group}/${r.name}`, title: r.about }, r.name.replaceAll("_", " ")))));
  }
  $("colour").addEventListener("change", (e) => recolour(e.target.value));
  document.addEventListener("keydown", (e) => {
    if (e.target.matches("input, select, textarea") || e.altKey || e.ctrlKey || e.metaKey) return;
    if (e.key === "[") turn(-1);
    else if (e.key === "]") turn(1);
    else if (e.key === "b" && two) setArm(kinds[(kinds.findIndex(([a]) => a === state.arm) + 1) % 3][0]);
    else if (e.key === "d") document.querySelector(`#ways button[data-way=${state.way === "row" ? "col" : "row"}]`).click();
  });
  // A swipe over the title and the map's frame turns heads; over the map itself it draws.
  let from = null;
  const bar_ = document.querySelector(".head .bar");
  bar_.addEventListener("pointerdown", (e) => { from = e.pointerType === "touch" ? e.clientX : null; });
  addEventListener("pointerup", (e) => { if (from !== null && Math.abs(e.clientX - from) > 50) turn(e.clientX < from ? 1 : -1); from = null; });
  const widths = new Map();
  const watcher = new ResizeObserver((entries) => {
    for (const { target, contentRect: { width } } of entries) {
      const was = widths.get(target);
      widths.set(target, width);
      if (was === undefined || Math.abs(was - width) < 1) continue;
      if (target === $("gridbox")) drawGrid(); else if (shown) { drawMap(); drawPlane(); }
    }
  });
  darkness.addEventListener("change", () => { ramps(); drawGrid(); if (shown) { drawMap(); look(); } });

  [state.site, state.head] = data.start;
  start();
  drawGrid();
  requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("overview")));
  showHead();
  watcher.observe($("gridbox"));
  watcher.observe($("mapbox"));
})();
