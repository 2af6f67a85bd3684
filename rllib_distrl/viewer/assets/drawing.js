// ---- drawings ----
function canvasPen(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  return pen;
}
function axisTicks(low, high) {
  const step = [0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100].find((s) => (high - low) / s <= 5) ?? (high - low) / 4;
  const ticks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9; v += step) ticks.push(Math.abs(v) < 1e-9 ? 0 : v);
  return ticks;
}
function returnRange() {
  const [low, high] = index.scales.return, margin = 0.06 * (high - low || 1);
  return [low - margin, high + margin];
}
const LEFT = 34, RIGHT = 8, HEAT = 12;
function stripX(t, width) { return LEFT + ((t + 0.5) / current.n) * (width - LEFT - RIGHT); }
function drawStrip() {
  const canvas = $("strip"), width = canvas.clientWidth, height = canvas.clientHeight;
  $("strip-figure").hidden = !current.value;
  if (!current.value || !width) return;
  const pen = canvasPen(canvas, width, height), [low, high] = returnRange(), bottom = height - HEAT - 8;
  const y = (v) => 6 + (1 - (Math.min(Math.max(v, low), high) - low) / (high - low)) * (bottom - 6);
  pen.fillStyle = css("--soft");
  pen.strokeStyle = css("--line");
  for (const v of axisTicks(low, high)) {
    pen.beginPath(); pen.moveTo(LEFT, y(v)); pen.lineTo(width - RIGHT, y(v)); pen.stroke();
    pen.textAlign = "right"; pen.fillText(figures(v, 2).replace(/\.?0+$/, ""), LEFT - 5, y(v) + 4);
  }
  const step = Math.max(1, Math.floor(current.n / (2 * width))), ts = [];
  for (let t = 0; t < current.n; t += step) ts.push(t);
  pen.fillStyle = pen.strokeStyle = css("--fan");
  if (current.quantiles) {
    for (const [from, to, alpha] of [[0.05, 0.95, 0.18], [0.25, 0.75, 0.3]]) {
      pen.globalAlpha = alpha;
      band(pen, ts, width, y, (t) => level(quantilesAt(current, t), from), (t) => level(quantilesAt(current, t), to));
    }
    pen.globalAlpha = 1;
  }
  const middle = current.quantiles ? (t) => level(quantilesAt(current, t), 0.5) : (t) => current.value[t];
  pen.lineWidth = 2;
  pen.beginPath();
  steps(ts, width).forEach(([x, t]) => pen.lineTo(x, y(middle(t))));
  pen.stroke();
  pen.strokeStyle = css("--soft"); pen.lineWidth = 1; pen.setLineDash([2, 2]);
  for (const [at] of current.replies) {
    const x = Math.round(stripX(at - 0.5, width)) + 0.5;
    pen.beginPath(); pen.moveTo(x, 2); pen.lineTo(x, bottom); pen.stroke();
  }
  const final = index.score[completion];
  pen.strokeStyle = css("--ink"); pen.setLineDash([5, 4]); pen.lineWidth = 1.5;
  pen.beginPath(); pen.moveTo(LEFT, y(final)); pen.lineTo(width - RIGHT, y(final)); pen.stroke(); pen.setLineDash([]);
  heat(pen, ts, width, bottom + 4);
  const at = stripX(peeked ?? token, width);
  pen.strokeStyle = css("--accent"); pen.lineWidth = 1.5;
  pen.beginPath(); pen.moveTo(at, 2); pen.lineTo(at, height); pen.stroke();
}
// A token's prediction holds over the token's width.
function steps(ts, width) {
  const half = (stripX(1, width) - stripX(0, width)) / 2;
  return ts.length > 400 ? ts.map((t) => [stripX(t, width), t]) : ts.flatMap((t) => [[stripX(t, width) - half, t], [stripX(t, width) + half, t]]);
}
function band(pen, ts, width, y, lower, upper) {
  const points = steps(ts, width);
  pen.beginPath();
  points.forEach(([x, t]) => pen.lineTo(x, y(upper(t))));
  points.reverse().forEach(([x, t]) => pen.lineTo(x, y(lower(t))));
  pen.fill();
}
function heat(pen, ts, width, top) {
  const which = MODES[mode];
  if (!usable(which)) return;
  const wide = Math.max(1, (width - LEFT - RIGHT) / ts.length);
  for (const t of ts) {
    const [share, hue] = shade(which, current[which.column][t]);
    pen.fillStyle = css(hue); pen.globalAlpha = share;
    pen.fillRect(stripX(t, width) - wide / 2, top, wide, HEAT);
  }
  pen.globalAlpha = 1;
}
// One dot per quantile, stacked: the share of dots is the probability.
function drawDots(t) {
  const canvas = $("dots"), width = canvas.clientWidth, height = canvas.clientHeight;
  $("dots-figure").hidden = !current.quantiles;
  if (!current.quantiles || !width || !current.n) return;
  const pen = canvasPen(canvas, width, height), [low, high] = returnRange(), floor = height - 20;
  const x = (v) => 10 + ((Math.min(Math.max(v, low), high) - low) / (high - low)) * (width - 20);
  const quantiles = quantilesAt(current, t), bins = 30, wide = (width - 20) / bins, stacks = new Array(bins + 1).fill(0);
  const places = Array.from(quantiles, (v) => Math.min(bins - 1, Math.floor((x(v) - 10) / wide)));
  const most = Math.max(...places.map((b) => ++stacks[b]));
  const size = Math.min(wide, (floor - 8) / most);
  stacks.fill(0);
  pen.strokeStyle = css("--line"); pen.fillStyle = css("--soft"); pen.textAlign = "center";
  pen.beginPath(); pen.moveTo(6, floor + 1); pen.lineTo(width - 6, floor + 1); pen.stroke();
  for (const v of axisTicks(low, high)) pen.fillText(figures(v, 2).replace(/\.?0+$/, ""), x(v), height - 5);
  pen.fillStyle = css("--fan");
  for (const b of places) {
    pen.beginPath();
    pen.arc(10 + (b + 0.5) * wide, floor - size * (stacks[b]++ + 0.5), Math.max(1, 0.46 * size), 0, 7);
    pen.fill();
  }
  for (const [v, colour, dash] of [[current.value[t], "--fan", []], [index.score[completion], "--ink", [5, 4]]]) {
    pen.strokeStyle = css(colour); pen.lineWidth = 1.6; pen.setLineDash(dash);
    pen.beginPath(); pen.moveTo(x(v), 2); pen.lineTo(x(v), floor); pen.stroke();
  }
}
function drawDetails(t) {
  const numbers = $("numbers"), top = $("top");
  numbers.replaceChildren();
  top.replaceChildren();
  if (!current.n) { $("chosen").textContent = ""; $("position").textContent = ""; return; }
  $("chosen").textContent = short(current.text[t].replace(/\n/g, "↵"), LONGEST_TOKEN).trim() || "·";
  $("position").textContent = index.info.words ? `word ${t + 1} of ${current.n}` : `token ${t + 1} of ${current.n} · id ${current.id[t]}`;
  const fact = (name, value) => { put(numbers, "dt", name); put(numbers, "dd", value); };
  if (current.replies.length) fact("Turn", `${turnOf(current, t)} of ${turnsOf(current)}`);
  if (current.logp) fact("Probability", percent(Math.exp(current.logp[t])));
  if (current.value) fact("Value", figures(current.value[t]));
  if (current.quantiles) {
    const quantiles = quantilesAt(current, t);
    fact("5 – 95 %", `${figures(level(quantiles, 0.05), 2)} … ${figures(level(quantiles, 0.95), 2)}`);
    fact("Spread", figures(current.spread[t]));
  }
  for (const [name, column] of [["Bonus", "bonus"], ["Advantage", "advantage"], ["… as trained on", "advantage_used"], ["Entropy (nats)", "entropy"], ["Log-probability", "logp"]])
    if (current[column]) fact(name, figures(current[column][t]));
  if (current.logp_difference) fact("Learner / sampler", figures(Math.exp(current.logp_difference[t]), 5));
  drawDots(t);
  $("top-title").hidden = !current.top;
  if (current.top) alternatives(t, top);
}
function alternatives(t, list) {
  const k = index.n_top;
  let found = false;
  for (let i = t * k; i < (t + 1) * k; i++) found = alternative(list, current.top[i], current.topLogp[i], !found && current.top[i].trim() === current.text[t].trim()) || found;
  if (!found) alternative(list, current.text[t], current.logp[t], true);
}
function alternative(list, text, logp, taken) {
  const item = put(list, "li", undefined, taken ? "taken" : "");
  put(item, "i").style.width = `${100 * Math.exp(logp)}%`;
  put(item, "b", short(text.replace(/\n/g, "↵"), 40) || "·");
  put(item, "span", percent(Math.exp(logp)));
  if (taken) item.title = "sampled";
  return taken;
}
function peek(t) {
  peeked = t;
  drawStrip();
  drawDetails(t ?? token);
}
