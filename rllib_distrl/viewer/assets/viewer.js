// ---- the list ----
function applyFilter() {
  const chosen = FILTERS[filter], wanted = $("search").value.trim().toLowerCase();
  let kept = Array.from(index.score.keys());
  if (chosen.by) {
    const scores = index[chosen.by];
    kept.sort((a, b) => scores[b] - scores[a]);
    kept = kept.slice(0, Math.max(1, Math.ceil(TOP_SHARE * kept.length)));
  } else kept = kept.filter(chosen.keep);
  if (wanted) kept = kept.filter((c) => `${index.problems[index.problem[c]]}\n${index.snippet[c]}`.toLowerCase().includes(wanted));
  shown = [];
  let last = null;
  for (const c of kept) {
    if (!chosen.by && index.problem[c] !== last) shown.push({ problem: (last = index.problem[c]) });
    shown.push({ c });
  }
  $("rows").style.height = `${shown.length * ROW}px`;
  $("count").textContent = `${kept.length.toLocaleString("en")} of ${index.score.length.toLocaleString("en")} completions`;
  for (const [i, button] of [...$("filters").children].entries()) button.setAttribute("aria-pressed", i === filter);
  drawRows();
  if (kept.length && !kept.includes(completion)) open(kept[0]); else reveal();
}
function drawRows() {
  const first = Math.max(0, Math.floor($("list").scrollTop / ROW) - 4);
  const last = Math.min(shown.length, first + Math.ceil($("list").clientHeight / ROW) + 8);
  const rows = $("rows");
  rows.replaceChildren();
  for (let i = first; i < last; i++) {
    const row = put(rows, "div", undefined, shown[i].c === undefined ? "row group" : "row");
    row.style.top = `${i * ROW}px`;
    if (shown[i].c === undefined) groupRow(row, shown[i].problem); else completionRow(row, shown[i].c, i);
  }
  if (![...rows.children].some((row) => row.id === $("list").getAttribute("aria-activedescendant"))) $("list").removeAttribute("aria-activedescendant");
}
function groupRow(row, problem) {
  const members = groups.get(problem);
  row.setAttribute("role", "presentation");
  put(row, "span", visible(index.problems[problem]), "text").dir = "auto";
  put(row, "span", `${members.filter((c) => index.status[c] === "correct").length}/${members.length}`, "extra").title = "correct";
}
function mark(c) {
  if (index.status[c] === "correct") return ["✓", "good", "correct"];
  if (index.cut[c]) return ["…", "warn", "truncated"];
  return index.score[c] > 0 ? ["◐", "warn", "partly right"] : ["✗", "bad", "wrong"];
}
function completionRow(row, c, i) {
  const [sign, kind, words] = mark(c);
  row.id = `row-${i}`;
  row.dataset.c = c;
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", c === completion);
  if (c === completion) $("list").setAttribute("aria-activedescendant", row.id);
  const symbol = put(row, "span", sign, `mark ${kind}`);
  symbol.setAttribute("aria-label", words);
  symbol.title = words;
  put(row, "span", visible(index.snippet[c]).replace(/\n/g, " ") || "(empty)", "text").dir = "auto";
  const by = FILTERS[filter].by;
  if (by) put(row, "span", figures(index[by][c]), "extra");
  else if (index.score[c] > 0 && index.score[c] < 1) put(row, "span", index.score[c].toFixed(2), "extra");
  if (index.sparkline) sparkline(put(row, "canvas"), index.sparkline[c]);
}
function sparkline(canvas, values) {
  const pen = canvasPen(canvas, 56, 20), [low, high] = index.scales.value;
  pen.strokeStyle = css("--fan");
  pen.lineWidth = 1.4;
  pen.beginPath();
  values.forEach((v, i) => pen.lineTo(1 + (54 * i) / (values.length - 1), 18 - 16 * Math.min(Math.max((v - low) / (high - low || 1), 0), 1)));
  pen.stroke();
}
function reveal() {
  const i = shown.findIndex((row) => row.c === completion), list = $("list");
  if (i < 0) return;
  if (i * ROW < list.scrollTop + ROW) list.scrollTop = Math.max(0, (i - 1) * ROW);
  else if ((i + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (i + 1) * ROW - list.clientHeight;
  drawRows();
}

// ---- one completion ----
async function open(c, t = 0) {
  completion = c;
  reveal();
  const data = await load(c);
  if (c !== completion) return;  // another one was opened meanwhile
  current = data;
  peeked = null;
  $("prompt").textContent = short(data.prompt, 20000);
  $("prompt").dir = direction(data.prompt);
  const [sign, kind, words] = mark(c), verdict = $("verdict");
  verdict.replaceChildren();
  put(verdict, "b", `${sign} ${words}`, kind);
  put(verdict, "span", `return ${figures(index.score[c], 2)}`);
  put(verdict, "span", `${data.n.toLocaleString("en")} tokens${data.replies.length ? ` in ${turnsOf(data)} turns` : ""}${index.cut[c] ? ", cut at the limit" : ""}`);
  put(verdict, "span", `sample ${index.sample[c]} of problem ${index.problem[c]}`);
  if (!["correct", "wrong"].includes(index.status[c])) put(verdict, "span", `status ${index.status[c]}`);
  if (data.answer && data.answer.trim() !== index.snippet[c].trim()) put(verdict, "span", `answer ${short(data.answer, 120)}`).dir = "auto";
  for (const key of document.getElementsByClassName("reply-key")) key.hidden = !data.replies.length;
  $("tokens").dir = direction(data.text.slice(0, 400).join(""));
  choose(Math.min(t, Math.max(data.n - 1, 0)), true);
}
function choose(t, fresh = false) {
  if (!current) return;
  const samePage = !fresh && Math.floor(t / PAGE) === Math.floor(token / PAGE);
  token = t;
  if (samePage) {
    $("tokens").querySelector(".chosen")?.classList.remove("chosen");
    $("tokens").querySelector(`[data-t="${t}"]`)?.classList.add("chosen");
  } else drawTokens();
  $("tokens").querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
  history.replaceState(null, "", `#${completion}.${token}`);
  drawStrip();
  drawDetails(t);
}
function drawTokens() {
  const start = Math.floor(token / PAGE) * PAGE, end = Math.min(start + PAGE, current.n), box = $("tokens");
  const which = MODES[mode], values = usable(which) ? current[which.column] : null;
  const parts = document.createDocumentFragment(), replied = [...current.replies];
  const putReplies = (t) => { while (replied.length && replied[0][0] <= t) putReply(parts, replied.shift()[1]); };
  while (replied.length && replied[0][0] < start) replied.shift();  // on an earlier page
  for (let t = start; t < end; t++) {
    putReplies(t);
    const text = current.text[t], span = put(parts, "span", undefined, t === token ? "chosen" : "");
    span.dataset.t = t;
    if (text === "") { span.textContent = "·"; span.classList.add("odd"); }
    else if (text.includes("\n")) span.textContent = short(text, LONGEST_TOKEN).replace(/\n/g, "↵\n");
    else span.textContent = short(text, LONGEST_TOKEN);
    if (values) span.style.backgroundColor = tint(shade(which, values[t]));
  }
  if (end === current.n) putReplies(end);
  if (!current.n) put(parts, "em", "(no tokens)");
  box.replaceChildren(parts);
  $("pages").hidden = current.n <= PAGE;
  $("page").textContent = `${(start + 1).toLocaleString("en")}–${end.toLocaleString("en")} of ${current.n.toLocaleString("en")} tokens`;
  $("back").disabled = start === 0;
  $("forth").disabled = end === current.n;
}
function putReply(parent, text) {
  const shown = short(text, LONGEST_REPLY), inner = shown.replace(/^\n+|\n+$/g, (ends) => "↵".repeat(ends.length));
  const reply = put(parent, "span", inner.replace(/\n/g, "↵\n"), text.includes("\n") ? "reply lines" : "reply");
  reply.dir = "auto";
  reply.title = "reply of the environment: not sampled";
  reply.setAttribute("role", "note");
}
function drawLegend() {
  const which = MODES[mode], known = usable(which);
  for (const [i, button] of [...$("modes").children].entries()) button.setAttribute("aria-pressed", i === mode && known);
  $("legend").style.visibility = known ? "visible" : "hidden";
  if (!known) return;
  const [low, high] = bounds(which), show = which.show ?? ((x) => x);
  $("low").textContent = figures(show(low));
  $("high").textContent = figures(show(high));
  $("meaning").textContent = which.meaning;
  $("ramp").style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map((p) => tint(shade(which, low + p * (high - low)))).join(", ")})`;
}

// ---- events ----
function setMode(number) {
  if (!MODES[number] || !usable(MODES[number])) return;
  mode = number;
  drawLegend();
  if (current) { drawTokens(); drawStrip(); }
}
function setFilter(number) { filter = number; applyFilter(); }
function moveCompletion(by) {
  const all = shown.filter((row) => row.c !== undefined), i = all.findIndex((row) => row.c === completion);
  const next = all[Math.min(Math.max(i + by, 0), all.length - 1)];
  if (next && next.c !== completion) open(next.c);
}
function moveToken(by) { if (current?.n) choose(Math.min(Math.max(token + by, 0), current.n - 1)); }
function strongest() {
  const which = MODES[mode];
  if (!usable(which) || !current?.n) return;
  const values = current[which.column].map((v) => (which.plus ? Math.abs(v) : v));
  choose(values.indexOf(Math.max(...values.slice(0, 1e5))));
}
function redraw() { drawRows(); drawLegend(); if (current) { drawTokens(); drawStrip(); drawDetails(token); } }
function setTheme(name) { document.documentElement.dataset.theme = name; if (index) redraw(); }
function toggleTheme() { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); }
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.id === "search") {
    if (event.key === "Escape" || event.key === "Enter") { $("list").focus(); event.preventDefault(); }
    return;
  }
  const forward = $("tokens").dir === "rtl" ? -1 : 1;
  const actions = {
    ArrowDown: () => moveCompletion(1), j: () => moveCompletion(1),
    ArrowUp: () => moveCompletion(-1), k: () => moveCompletion(-1),
    ArrowRight: () => moveToken(forward), ArrowLeft: () => moveToken(-forward),
    Home: () => choose(0), End: () => moveToken(Infinity), m: strongest,
    f: () => { let next = filter; do next = (next + 1) % FILTERS.length; while ($("filters").children[next].disabled); setFilter(next); },
    "/": () => $("search").focus(), "?": () => $("help").showModal(), t: toggleTheme,
  };
  const action = actions[event.key] ?? (/^[1-9]$/.test(event.key) ? () => setMode(event.key - 1) : null);
  if (action) { event.preventDefault(); action(); }
}
function stripToken(event) {
  const box = $("strip").getBoundingClientRect();
  const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
  return Math.min(Math.max(Math.floor(share * current.n), 0), current.n - 1);
}
function listen() {
  document.addEventListener("keydown", onKey);
  $("list").addEventListener("scroll", drawRows);
  $("list").addEventListener("click", (event) => { const row = event.target.closest(".row[data-c]"); if (row) open(Number(row.dataset.c)); });
  $("search").addEventListener("input", applyFilter);
  $("tokens").addEventListener("click", (event) => { if (event.target.dataset?.t) choose(Number(event.target.dataset.t)); });
  $("tokens").addEventListener("mouseover", (event) => { if (event.target.dataset?.t) peek(Number(event.target.dataset.t)); });
  $("tokens").addEventListener("mouseleave", () => peek(null));
  $("strip").addEventListener("mousemove", (event) => { if (current?.n) peek(stripToken(event)); });
  $("strip").addEventListener("mouseleave", () => peek(null));
  $("strip").addEventListener("click", (event) => { if (current?.n) choose(stripToken(event)); });
  $("back").addEventListener("click", () => choose(Math.max(0, (Math.floor(token / PAGE) - 1) * PAGE)));
  $("forth").addEventListener("click", () => choose(Math.min(current.n - 1, (Math.floor(token / PAGE) + 1) * PAGE)));
  $("theme").addEventListener("click", toggleTheme);
  $("help-button").addEventListener("click", () => $("help").showModal());
  new ResizeObserver(() => { if (current) { drawStrip(); drawDetails(peeked ?? token); } drawRows(); }).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
}
const groups = new Map();
function buildControls() {
  $("title").textContent = visible(index.title);
  const info = index.info, words = [info.algorithm, info.iteration !== undefined && `iteration ${info.iteration}`, info.model, info.environment, info.split && `${info.split} problems`, index.note];
  $("about").textContent = visible(words.filter(Boolean).join(" · "));
  MODES.forEach((which, i) => {
    const button = put($("modes"), "button", which.name);
    button.type = "button";
    button.title = usable(which) ? `${which.meaning} (${i + 1})` : index.missing[which.column] ?? index.missing.quantiles ?? "not recorded";
    button.disabled = !usable(which);
    button.addEventListener("click", () => setMode(i));
  });
  FILTERS.forEach((chosen, i) => {
    const button = put($("filters"), "button", chosen.name);
    button.type = "button";
    if (chosen.by) button.disabled = !index[chosen.by];
    else put(button, "small", ` ${[...index.score.keys()].filter(chosen.keep).length.toLocaleString("en")}`);
    button.addEventListener("click", () => setFilter(i));
  });
}
async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  index = JSON.parse(new TextDecoder().decode(await unpack($("index"))));
  index.problem.forEach((p, c) => groups.set(p, [...(groups.get(p) ?? []), c]));
  mode = Math.max(0, MODES.findIndex(usable));
  buildControls();
  listen();
  const [c, t] = location.hash.slice(1).split(".").map(Number);
  if (c > 0 && c < index.score.length) completion = c;
  applyFilter();
  drawLegend();
  await open(completion >= 0 ? completion : shown[1].c, t || 0);
  document.documentElement.dataset.ready = "yes";
}
start();
