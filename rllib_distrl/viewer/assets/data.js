"use strict";
// Texts of completions are only ever assigned to textContent: nothing here builds HTML.
const $ = (id) => document.getElementById(id);
const ROW = 34;              // height of a list row in px, as in the style sheet
const PAGE = 1500;           // tokens shown at once
const LONGEST_TOKEN = 300;   // letters of a token that are shown
const LONGEST_REPLY = 4000;  // letters of a reply that are shown
const CACHE = 24;            // decoded blocks kept
const TOP_SHARE = 0.1;       // "most uncertain" and "largest bonus": the top tenth

const MODES = [
  { name: "Value", column: "value", colour: "--value", meaning: "expected return before the token" },
  { name: "Spread", column: "spread", colour: "--spread", meaning: "standard deviation of the predicted returns" },
  { name: "Bonus", column: "bonus", plus: "--bonus", minus: "--minus", meaning: "optimism added to the advantage" },
  { name: "Advantage", column: "advantage_used", plus: "--plus", minus: "--minus", meaning: "advantage that the policy is trained on" },
  { name: "Entropy", column: "entropy", colour: "--entropy", meaning: "of the next-token distribution, nats" },
  { name: "Logp ratio", column: "logp_difference", plus: "--plus", minus: "--minus", meaning: "learner's probability over the sampler's", least: 0.01, show: Math.exp },
];
const FILTERS = [
  { name: "All", keep: () => true },
  { name: "Correct", keep: (c) => index.status[c] === "correct" },
  { name: "Wrong", keep: (c) => index.status[c] !== "correct" },
  { name: "Truncated", keep: (c) => index.cut[c] },
  { name: "Most uncertain", by: "uncertainty" },
  { name: "Largest bonus", by: "bonus" },
];

let index, shown = [], filter = 0, mode = 0, completion = -1, token = 0, peeked = null, current = null;
const cache = new Map();

async function unpack(element) {
  const text = atob(element.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// Half precision to single, through a table of all 65,536 numbers.
let halves = null;
function fromHalf(codes) {
  if (!halves) {
    halves = new Float32Array(65536);
    for (let code = 0; code < 65536; code++) {
      const sign = code & 0x8000 ? -1 : 1, exponent = (code >> 10) & 31, fraction = code & 1023;
      halves[code] = exponent === 31 ? (fraction ? NaN : sign * Infinity)
        : exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
    }
  }
  return Float32Array.from(codes, (code) => halves[code]);
}

async function loadBlock(number) {
  if (!cache.has(number)) {
    if (cache.size >= CACHE) cache.delete(cache.keys().next().value);
    cache.set(number, unpack(document.getElementsByClassName("block")[number]).then((buffer) => {
      const length = new DataView(buffer).getUint32(0, true);
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
      let offset = 4 + length;
      header.columns = {};
      for (const [name, kind, size] of header.arrays) {
        const wide = kind === "<u4";
        const raw = wide ? new Uint32Array(buffer, offset, size) : new Uint16Array(buffer, offset, size);
        header.columns[name] = wide ? raw : fromHalf(raw);
        offset += size * (wide ? 4 : 2);
      }
      return header;
    }));
  }
  return cache.get(number);
}

async function load(c) {
  const number = index.blocks.findIndex(([start, stop]) => c >= start && c < stop);
  const block = await loadBlock(number), row = c - index.blocks[number][0];
  const before = block.lengths.slice(0, row).reduce((sum, n) => sum + n, 0), n = block.lengths[row];
  const part = (name, width) => block.columns[name]?.subarray(before * width, (before + n) * width);
  const data = { c, n, prompt: block.prompts[row], answer: block.answers?.[row], replies: block.replies?.[row] ?? [], id: part("token", 1) };
  data.text = Array.from(part("text", 1), (i) => block.texts[i]);
  for (const name of index.columns) data[name] = part(name, name === "quantiles" ? index.n_quantiles : 1);
  if (index.n_top) {
    data.top = Array.from(part("top", index.n_top), (i) => block.texts[i]);
    data.topLogp = part("top_logp", index.n_top);
  }
  if (data.quantiles) data.spread = Float32Array.from({ length: n }, (_, t) => deviation(quantilesAt(data, t)));
  return data;
}

// Of an environment that replies; the first turn is 1.
const turnOf = (data, t) => 1 + data.replies.filter(([at]) => at <= t).length;
const turnsOf = (data) => turnOf(data, data.n - 1);
const quantilesAt = (data, t) => data.quantiles.subarray(t * index.n_quantiles, (t + 1) * index.n_quantiles);
function deviation(values) {
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  return Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
}
// Quantiles sit at the midpoints (i + 1/2) / N.
function level(quantiles, tau) {
  const place = Math.min(Math.max(tau * quantiles.length - 0.5, 0), quantiles.length - 1), i = Math.floor(place);
  return quantiles[i] + (place - i) * ((quantiles[i + 1] ?? quantiles[i]) - quantiles[i]);
}

// ---- text ----
// Letters that would be invisible or reorder their surroundings are spelled out.
const HIDDEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]/gu;
function visible(text) {
  return text.replace(HIDDEN, (letter) => {
    const code = letter.codePointAt(0);
    if (code === 9) return "⇥";
    return code < 32 ? String.fromCodePoint(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}
function short(text, most) {
  return text.length > most ? `${visible(text.slice(0, most))}… (${text.length.toLocaleString("en")} letters)` : visible(text);
}
const RTL = /[\u0591-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/, LTR = /[A-Za-z\u00c0-\u058f\u0900-\u1fff\u3040-\u9fff\uac00-\ud7a3]/;
function direction(text) {
  for (const letter of text.slice(0, 2000)) {
    if (RTL.test(letter)) return "rtl";
    if (LTR.test(letter)) return "ltr";
  }
  return "ltr";
}
function put(parent, tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  parent.append(element);
  return element;
}
function figures(value, digits = 3) {
  if (value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : value.toFixed(digits);
}
const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(1)} %` : p >= 0.0005 ? `${(100 * p).toFixed(2)} %` : "< 0.05 %");

// ---- colours ----
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function bounds(which) {
  const [low, high] = index.scales[which.column];
  if (!which.plus) return [low, high];
  const most = Math.max(Math.abs(low), Math.abs(high), which.least ?? 0) || 1;
  return [-most, most];
}
// Share of a hue in [0, 1], and the hue.
function shade(which, value) {
  const [low, high] = bounds(which);
  if (Number.isNaN(value)) return [0, which.plus ?? which.colour];
  if (which.plus) return [Math.min(Math.abs(value) / high, 1), value < 0 ? which.minus : which.plus];
  return [Math.min(Math.max((value - low) / (high - low || 1), 0), 1), which.colour];
}
const tint = ([share, hue]) => `color-mix(in srgb, var(${hue}) calc(var(--tint) * ${share.toFixed(3)}), transparent)`;
const usable = (which) => index.scales[which.column] !== undefined;
