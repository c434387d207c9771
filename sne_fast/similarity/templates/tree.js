
const items = data.names.map(() => null); // the list item of each network
const trees = byId("trees");
const OPEN = 300; // rows up to which all families are open at first
let hits = [], turn = -1;

function describe(row) {
  const line = element("span");
  line.append(element("span", data.names[row.network], "name"));
  if (row.edge === null) return line;
  const edge = data.edges[row.edge], note = element("span", "", "note");
  note.append(element("span", edge.relation, edge.guess ? "relation guess" : "relation"));
  note.append(` distance ${edge.distance.toFixed(3)}, ` + (edge.guess ? `direction guessed (evidence ${edge.evidence.toFixed(2)})` : `evidence ${edge.evidence.toFixed(2)}`));
  line.append(note);
  return line;
}

function build(rows, into) {
  const lists = [into]; // the list of each depth
  rows.forEach((row, k) => {
    const item = element("li"), parent = k + 1 < rows.length && rows[k + 1].depth > row.depth, line = describe(row);
    if (row.again) {
      line.append(button("shown elsewhere", () => reveal(items[row.network])));
    } else {
      items[row.network] = item;
    }
    if (parent) {
      const details = element("details"), summary = element("summary"), list = element("ul");
      details.open = data.rows.length <= OPEN;
      summary.append(line);
      details.append(summary, list);
      item.append(details);
      lists[row.depth + 1] = list;
    } else {
      line.className = "leaf";
      line.tabIndex = -1;
      item.append(line);
    }
    lists[row.depth].append(item);
  });
}

function reveal(item) {
  for (let at = item.parentElement; at !== trees; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  const line = item.querySelector("summary, .leaf");
  line.focus();
  line.scrollIntoView({ block: "center" });
}

function search(query) {
  const found = find(query);
  const kept = new Set();
  for (const i of found) {
    for (let at = items[i]; at !== trees && !kept.has(at); at = at.parentElement) {
      kept.add(at);
      if (at.tagName === "DETAILS") at.open = true;
    }
  }
  hits = found.map((i) => items[i]);
  turn = -1;
  const all = query.trim() === "";
  for (const item of trees.querySelectorAll("li")) item.hidden = !all && !kept.has(item);
  items.forEach((item) => item.classList.remove("hit"));
  hits.forEach((item) => item.classList.add("hit"));
  say(all ? data.summary : `${hits.length.toLocaleString("en")} of ${data.names.length.toLocaleString("en")} networks found`);
}

const families = element("ul");
build(data.rows, families);
trees.append(families);
if (data.alone.length) {
  const details = element("details"), summary = element("summary"), list = element("ul");
  summary.textContent = `${data.alone.length.toLocaleString("en")} without relatives`;
  build(data.alone.map((network) => ({ network, depth: 0, edge: null, again: false })), list);
  details.append(summary, list);
  trees.append(details);
}
say(data.summary);

byId("query").addEventListener("input", (event) => search(event.target.value));
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  if (hits.length) reveal(hits[(turn = (turn + 1) % hits.length)]);
});
for (const [id, open] of [["open", true], ["close", false]]) {
  byId(id).addEventListener("click", () => {
    for (const details of trees.querySelectorAll("details")) details.open = open;
  });
}
