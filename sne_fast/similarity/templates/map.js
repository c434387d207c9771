
const canvas = byId("canvas");
const context = canvas.getContext("2d");
const tip = byId("tip");
const count = data.names.length;
const dark = matchMedia("(prefers-color-scheme: dark)");
const GROUPS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#9966cc", "#999933", "#dd4499"];
const SCALE = [[68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];
const STEPS = 48;
const GREY = "#8b949e";

// ------------------------------------------------------------------------------------------------------- positions
const xs = new Float64Array(count), ys = new Float64Array(count);
{
  const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const [left, right] = range(data.x), [low, high] = range(data.y);
  const half = Math.max(right - left, high - low) / 2 || 1;
  for (let i = 0; i < count; i++) {
    xs[i] = (data.x[i] - (left + right) / 2) / half;
    ys[i] = ((low + high) / 2 - data.y[i]) / half; // up is up
  }
}
let width = 1, height = 1;
let view = { x: 0, y: 0, scale: 1 }; // the centre, and pixels of a unit
let chosen = -1, hovered = -1, asked = false;
let paints = [], members = []; // colours, and the networks of each
let matches = null; // positions that a search found; null without one
const pressed = new Set(); // groups of the legend that are shown alone
let dimmed = new Uint8Array(count);

const whole = () => 0.45 * Math.min(width, height);
const screenX = (i) => (xs[i] - view.x) * view.scale + width / 2;
const screenY = (i) => (ys[i] - view.y) * view.scale + height / 2;

function redraw() {
  if (!asked) {
    asked = true;
    requestAnimationFrame(draw);
  }
}

function radius() {
  const base = Math.max(1.6, Math.min(6, 160 / Math.sqrt(count)));
  return Math.min(9, base * Math.sqrt(Math.max(1, view.scale / whole())));
}

function draw() {
  asked = false;
  const ratio = devicePixelRatio || 1, size = radius();
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  for (const faint of [1, 0]) {
    context.globalAlpha = faint ? 0.12 : 0.85;
    paints.forEach((paint, k) => {
      context.fillStyle = paint;
      context.beginPath();
      for (const i of members[k]) {
        if (dimmed[i] !== faint) continue;
        const x = screenX(i), y = screenY(i);
        if (x < -size || y < -size || x > width + size || y > height + size) continue;
        if (size < 2) {
          context.rect(x - size, y - size, 2 * size, 2 * size); // so small, not to be told from a disc; twice as fast
        } else {
          context.moveTo(x + size, y);
          context.arc(x, y, size, 0, 2 * Math.PI);
        }
      }
      context.fill();
    });
  }
  context.globalAlpha = 1;
  context.strokeStyle = getComputedStyle(document.body).color;
  for (const i of [hovered, chosen]) {
    if (i < 0) continue;
    context.lineWidth = i === chosen ? 2.5 : 1.5;
    context.beginPath();
    context.arc(screenX(i), screenY(i), size + 3, 0, 2 * Math.PI);
    context.stroke();
  }
}

// --------------------------------------------------------------------------------------------------------- colours
function stepColour(share) {
  const at = (dark.matches ? 0.2 + 0.8 * share : 0.92 * share) * (SCALE.length - 1);
  const k = Math.min(SCALE.length - 2, Math.floor(at));
  return `rgb(${SCALE[k].map((a, c) => Math.round(a + (at - k) * (SCALE[k + 1][c] - a))).join(",")})`;
}

function colourBy(column) {
  const legend = byId("legend");
  legend.replaceChildren();
  pressed.clear();
  if (!column) {
    paints = [GROUPS[0]];
    members = [data.names.map((_, i) => i)];
  } else if (column.kind === "number") {
    byNumber(column, legend);
  } else {
    byGroup(column, legend);
  }
  dim();
}

function byNumber(column, legend) {
  const known = column.values.filter((value) => value !== null).sort((a, b) => a - b);
  const low = known[0], high = known[known.length - 1], median = known[known.length >> 1];
  // Values most of which would have the colour of the least one.
  const logarithmic = low > 0 && high / low > 100 && (median - low) / (high - low) < 0.1;
  const place = (value) => (logarithmic ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low)) || 0;
  paints = Array.from({ length: STEPS }, (_, k) => stepColour(k / (STEPS - 1)));
  members = paints.map(() => []);
  const unknown = [];
  column.values.forEach((value, i) => {
    (value === null ? unknown : members[Math.round(place(value) * (STEPS - 1))]).push(i);
  });
  paints.unshift(GREY); // below the others
  members.unshift(unknown);
  legend.append(element("h2", column.name + (logarithmic ? " (logarithmic)" : "")));
  if (known.length) {
    const bar = element("div", "", "bar"), ends = element("div", "", "ends");
    bar.style.background = `linear-gradient(to right, ${paints.slice(1).join(",")})`;
    ends.append(element("span", shown(low)), element("span", shown(high)));
    legend.append(bar, ends);
  }
  if (unknown.length) legend.append(element("p", `grey: not known of ${unknown.length.toLocaleString("en")}`, "soft"));
}

function byGroup(column, legend) {
  const groups = column.groups, own = groups.length <= GROUPS.length ? groups.length : GROUPS.length - 1;
  paints = GROUPS.slice(0, own);
  members = paints.map(() => []);
  const rest = [];
  column.values.forEach((value, i) => (value === null || value >= own ? rest : members[value]).push(i));
  paints.unshift(GREY);
  members.unshift(rest);
  legend.append(element("h2", column.name));
  const names = [...groups.slice(0, own)];
  const entries = names.map((name, k) => [name, k + 1]);
  const left = groups.length > own ? [`${(groups.length - own).toLocaleString("en")} others`] : [];
  if (column.values.includes(null)) left.push("not known");
  if (rest.length) entries.push([left.join(", "), 0]);
  for (const [name, k] of entries) {
    const entry = button("", () => {
      const on = !pressed.has(k);
      if (on) pressed.add(k); else pressed.delete(k);
      entry.setAttribute("aria-pressed", String(on));
      dim();
    });
    entry.setAttribute("aria-pressed", "false");
    const swatch = element("span", "", "swatch");
    swatch.style.background = paints[k];
    entry.append(swatch, element("span", name), element("span", members[k].length.toLocaleString("en"), "count"));
    legend.append(entry);
  }
}

function dim() {
  dimmed.fill(matches === null ? 0 : 1);
  for (const i of matches ?? []) dimmed[i] = 0;
  if (pressed.size) {
    members.forEach((own, k) => { if (!pressed.has(k)) for (const i of own) dimmed[i] = 1; });
  }
  redraw();
}

// ---------------------------------------------------------------------------------------------- moving and choosing
function zoom(factor, x = width / 2, y = height / 2) {
  const scale = Math.min(whole() * 400, Math.max(whole() / 4, view.scale * factor));
  const keep = 1 / view.scale - 1 / scale; // what is under (x, y) stays there
  view = { x: view.x + (x - width / 2) * keep, y: view.y + (y - height / 2) * keep, scale };
  redraw();
}

function pan(dx, dy) {
  view = { ...view, x: view.x - dx / view.scale, y: view.y - dy / view.scale };
  redraw();
}

function showAll() {
  view = { x: 0, y: 0, scale: whole() };
  redraw();
}

function nearestTo(x, y, limit) {
  let best = -1, least = limit * limit;
  for (let i = 0; i < count; i++) {
    if (dimmed[i]) continue;
    const apart = (screenX(i) - x) ** 2 + (screenY(i) - y) ** 2;
    if (apart < least) { least = apart; best = i; }
  }
  return best;
}

function choose(i, move = false) {
  chosen = i;
  const panel = byId("chosen");
  panel.replaceChildren();
  if (i >= 0) {
    if (move) view = { x: xs[i], y: ys[i], scale: Math.max(view.scale, 4 * whole()) };
    const known = columnsOf(i);
    known.tabIndex = 0; // so that the keyboard can scroll it
    panel.append(element("h2", data.names[i]), known);
    const near = data.near ? data.near[i] : [];
    if (near.length) {
      const list = element("ul", "", "choices");
      for (const k of near) list.append(choice(k));
      panel.append(element("h2", "Nearest by their vectors"), list);
    }
  }
  redraw();
}

function choice(i) {
  const item = element("li");
  item.append(button(data.names[i], () => choose(i, true)));
  return item;
}

function valueOf(column, i) {
  const value = column.values[i];
  return column.kind === "group" && value !== null ? column.groups[value] : shown(value);
}

function columnsOf(i, shownColumns = data.columns) {
  const list = element("dl");
  for (const column of shownColumns) list.append(element("dt", column.name), element("dd", valueOf(column, i)));
  return list;
}

// The column that colours the networks, and the first ones of the others that are known of a network.
function mainColumns(i) {
  const first = data.columns[Number(columns.value)];
  const others = data.columns.filter((column) => column !== first && column.values[i] !== null);
  return [...(first ? [first] : []), ...others].slice(0, 5);
}

function hover(i, x, y) {
  if (i !== hovered) {
    hovered = i;
    tip.replaceChildren();
    if (i >= 0) tip.append(element("strong", data.names[i]), columnsOf(i, mainColumns(i)));
    redraw();
  }
  tip.hidden = i < 0;
  if (i >= 0) {
    tip.style.left = `${Math.max(0, Math.min(x + 14, width - tip.offsetWidth))}px`;
    tip.style.top = `${y + 14 + tip.offsetHeight > height ? Math.max(0, y - 14 - tip.offsetHeight) : y + 14}px`;
  }
}

// ----------------------------------------------------------------------------------------------------------- input
const pointers = new Map();
let travelled = 0;

function at(event) {
  const box = canvas.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  if (!pointers.size) travelled = 0;
  pointers.set(event.pointerId, at(event));
});
canvas.addEventListener("pointermove", (event) => {
  const here = at(event), before = pointers.get(event.pointerId);
  if (!before) {
    hover(nearestTo(here.x, here.y, 12), here.x, here.y);
    return;
  }
  pointers.set(event.pointerId, here);
  travelled += Math.hypot(here.x - before.x, here.y - before.y);
  if (travelled > 4) hover(-1);
  if (pointers.size === 1) {
    if (travelled > 4) pan(here.x - before.x, here.y - before.y);
  } else {
    const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
    const length = (a) => Math.max(1, Math.hypot(a.x - other.x, a.y - other.y));
    pan((here.x - before.x) / 2, (here.y - before.y) / 2);
    zoom(length(here) / length(before), (here.x + other.x) / 2, (here.y + other.y) / 2);
  }
});
canvas.addEventListener("pointerup", (event) => {
  const here = at(event), alone = pointers.size === 1;
  pointers.delete(event.pointerId);
  if (alone && travelled <= 4) {
    const limit = event.pointerType === "mouse" ? 12 : 24;
    choose(nearestTo(here.x, here.y, limit));
    hover(chosen, here.x, here.y);
  }
});
canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hover(-1); });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const { x, y } = at(event);
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), x, y);
}, { passive: false });

const KEYS = {
  ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
  "+": () => zoom(1.3), "=": () => zoom(1.3), "-": () => zoom(1 / 1.3), "0": showAll,
  Enter: () => choose(nearestTo(width / 2, height / 2, Infinity)), Escape: () => { choose(-1); hover(-1); },
};
canvas.addEventListener("keydown", (event) => {
  if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  KEYS[event.key]();
});
byId("closer").addEventListener("click", () => zoom(1.5));
byId("further").addEventListener("click", () => zoom(1 / 1.5));
byId("whole").addEventListener("click", showAll);

byId("query").addEventListener("input", (event) => {
  const query = event.target.value.trim(), list = element("ul");
  matches = query ? find(query) : null;
  for (const i of (matches ?? []).slice(0, 50)) list.append(choice(i));
  byId("results").replaceChildren(list);
  say(query ? `${matches.length.toLocaleString("en")} of ${count.toLocaleString("en")} networks found` : "");
  dim();
});

const columns = byId("column");
columns.append(new Option("none", "-1"), ...data.columns.map((column, k) => new Option(column.name, String(k))));
columns.value = String(data.colour);
const recolour = () => colourBy(data.columns[Number(columns.value)]);
columns.addEventListener("change", recolour);
dark.addEventListener("change", recolour);

new ResizeObserver(() => {
  const box = canvas.getBoundingClientRect(), before = whole(), ratio = devicePixelRatio || 1;
  [width, height] = [Math.max(1, box.width), Math.max(1, box.height)];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  view.scale *= whole() / before;
  draw();
}).observe(canvas);
view.scale = whole();
recolour();
