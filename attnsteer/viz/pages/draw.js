"use strict";
// Shared by the pages: elements, colours, bytes.
const $ = (id) => document.getElementById(id);
const make = (tag, given = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
};
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const percent = (p) => p >= 0.9995 ? "100 %" : p < 0.00005 ? "≈ 0" : `${(100 * p).toFixed(p < 0.0995 ? (p < 0.00995 ? 2 : 1) : 0)} %`;
const signed = (p) => `${p < 0 ? "−" : "+"}${(100 * Math.abs(p)).toFixed(Math.abs(p) < 0.0995 ? 1 : 0)} pp`;
const number = (v) => v === null || v === undefined ? "–" : Math.abs(v) >= 1000 || (v !== 0 && Math.abs(v) < 0.001) ? v.toExponential(1).replaceAll("-", "−") : String(+v.toPrecision(3)).replace("-", "−");

// base64 in an element -> bytes.
function bytes(text) {
  const raw = atob(text.trim()), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
async function inflate(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const parts = [], reader = stream.getReader();
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value); size += value.length;
  }
  const out = new Uint8Array(size);
  let at = 0;
  for (const part of parts) { out.set(part, at); at += part.length; }
  return out;
}

// Colours: from the paper to the ink, dark where the page is dark; and from one arm to the other.
const RAMPS = {
  light: { one: ["#ffffff", "#dbe7f8", "#a3c3ee", "#5b90dc", "#2457c5", "#10296b"], two: ["#8f2f00", "#e08a55", "#fff", "#4fb3bd", "#00525b"] },
  dark: { one: ["#1a1e24", "#1d3157", "#2a56a8", "#4f8af0", "#9cc3ff", "#f2f7ff"], two: ["#ffb58c", "#b5561f", "#1a1e24", "#127f8a", "#7fe3ec"] },
  heat: { one: ["#ff5a00", "#ff7a1a", "#ffa23a", "#ffd066", "#fff3b8", "#ffffff"] },
};
const rgb = (hex) => { const h = hex.length === 4 ? hex.replace(/#(.)(.)(.)/, "#$1$1$2$2$3$3") : hex; return [1, 3, 5].map((i) => parseInt(h.slice(i, i + 2), 16)); };
function table(stops) {
  const out = new Uint8Array(256 * 3), last = stops.length - 1, parsed = stops.map(rgb);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * last, k = Math.min(last - 1, Math.floor(at)), f = at - k;
    for (let c = 0; c < 3; c++) out[3 * i + c] = Math.round(parsed[k][c] * (1 - f) + parsed[k + 1][c] * f);
  }
  return out;
}
const darkness = window.matchMedia("(prefers-color-scheme: dark)");
let ONE, TWO;
const HEAT = table(RAMPS.heat.one);
function ramps() { const r = darkness.matches ? RAMPS.dark : RAMPS.light; ONE = table(r.one); TWO = table(r.two); }
ramps();
const colourOf = (lut, v) => { const i = 3 * clamp(Math.round(v * 255), 0, 255); return [lut[i], lut[i + 1], lut[i + 2]]; };
const css = (c) => `rgb(${c.join(",")})`;
const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const inkOn = (c) => light(c) > 0.2 ? "#171b21" : "#fff";
const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A canvas of a size in CSS pixels, sharp on its screen.
function fit(canvas, width, height) {
  const dense = Math.min(3, window.devicePixelRatio || 1);
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  canvas.width = Math.max(1, Math.round(width * dense)); canvas.height = Math.max(1, Math.round(height * dense));
  const context = canvas.getContext("2d");
  context.setTransform(dense, 0, 0, dense, 0, 0);
  return context;
}
// value(i, j) in 0..255 of an n x m map, as a picture of at most high x wide pixels; of cells that share a pixel the largest is shown.
function raster(n, m, high, wide, value, lut, far) {
  const h = Math.min(n, high), w = Math.min(m, wide);
  const cell = new Int16Array(h * w).fill(-1);
  const strength = far || ((v) => v);
  const column = new Int32Array(m);
  for (let j = 0; j < m; j++) column[j] = Math.floor((j * w) / m);
  for (let i = 0; i < n; i++) {
    const base = Math.floor((i * h) / n) * w;
    for (let j = 0; j < m; j++) {
      const v = value(i, j), at = base + column[j];
      if (cell[at] < 0 || strength(v) > strength(cell[at])) cell[at] = v;
    }
  }
  const image = new ImageData(w, h);
  for (let k = 0; k < cell.length; k++) {
    const i = 3 * cell[k];
    image.data[4 * k] = lut[i]; image.data[4 * k + 1] = lut[i + 1]; image.data[4 * k + 2] = lut[i + 2]; image.data[4 * k + 3] = 255;
  }
  const canvas = document.createElement("canvas");
  canvas.width = w; canvas.height = h;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
