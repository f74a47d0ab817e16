"use strict";

/* Search trees. Every text comes from a model or an environment: it reaches the page through textContent alone. */
(function viewer() {
  const trees = JSON.parse(document.getElementById("trees").textContent);
  const names = JSON.parse(document.getElementById("names").textContent);
  if (!trees.length) return;

  const byId = (id) => document.getElementById(id);
  const treeBox = byId("tree"), columns = byId("columns"), links = byId("links"), detail = byId("detail");
  const taskSelect = byId("task"), searchSelect = byId("search"), methodsBox = byId("methods");
  const tasks = [...new Set(trees.map((tree) => tree.task))];
  let tree = null; // the tree on the page
  let nodes = new Map(); // id -> node with children, path, order
  let cards = new Map(); // id -> element
  let selected = 0;

  function create(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }
  const methodName = (label) => (names[label] ? names[label].name : label || "unnamed");
  const role = (label) => (names[label] ? names[label].role : "muted");
  const isNumber = (value) => typeof value === "number";
  const fixed = (value) => (isNumber(value) ? value.toFixed(2).replace("-", "−") : "–");
  const signed = (value) => (isNumber(value) ? (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2) : "–");
  function ending(outcome, words = ["unknown", "solved", "failed"]) {
    if (!isNumber(outcome)) return words[0];
    if (outcome >= 1) return words[1];
    return outcome <= 0 ? words[2] : `outcome ${outcome.toFixed(2)}`;
  }
  const mark = (outcome) => ending(outcome, ["?", "✓", "✕"]).replace("outcome ", "");
  function searchKey(each) {
    const size = /^(\d+)x(\d+)$/.exec(each.beam);
    let search = size ? `beam ${size[1]}×${size[2]}` : each.beam || "search";
    if (size && size[1] === "1") search = `best of ${size[2]} at every step`;
    return each.seed === null ? search : `${search}, seed ${each.seed}`;
  }

  /* The line of a turn that a card shows: what follows the last "Action:", else the last line with text. */
  function gist(text) {
    const parts = text.split(/action:/i);
    const lines = parts[parts.length - 1].split("\n").map((line) => line.trim()).filter(Boolean);
    if (!lines.length) return "(empty)";
    return parts.length > 1 ? lines[0] : lines[lines.length - 1];
  }

  /* Fills `nodes` from the tree, with children in the order in which they are drawn. */
  function index() {
    const root = { id: 0, parent: null, round: 0, kept: true, count: 1, children: [], root: true };
    nodes = new Map([[0, root]]);
    for (const raw of tree.nodes) {
      const parent = nodes.get(raw.parent);
      const node = { ...raw, children: [], round: raw.round ?? parent.round + 1 };
      nodes.set(raw.id, node);
      parent.children.push(node);
    }
    for (let node = nodes.get(tree.best ?? -1); node; node = nodes.get(node.parent)) node.returned = true;
    const promise = (node) => (isNumber(node.promise) ? node.promise : -Infinity);
    const rank = (node) => [Number(Boolean(node.returned)), Number(node.kept), promise(node)];
    const better = (a, b) => rank(a).map((part, at) => rank(b)[at] - part).find((by) => by) || 0;
    for (const node of nodes.values()) node.children.sort(better);
  }

  /* Columns of nodes by distance from the task, children in the order of their parents. */
  function levels() {
    const result = [[nodes.get(0)]];
    for (;;) {
      const next = result[result.length - 1].flatMap((node) => node.children);
      if (!next.length) return result;
      result.push(next);
    }
  }

  function gauge(value, label) {
    const box = create("span", "gauge");
    const fill = create("i");
    fill.style.setProperty("--bar", `var(--${role(label)})`);
    fill.style.width = `${Math.min(1, Math.max(0, isNumber(value) ? value : 0)) * 100}%`;
    box.append(fill);
    box.setAttribute("aria-hidden", "true");
    return box;
  }

  function change(value) {
    const arrow = !isNumber(value) ? "" : value > 0.005 ? "▲" : value < -0.005 ? "▼" : "";
    return create("span", `change ${arrow === "▲" ? "up" : arrow === "▼" ? "down" : ""}`, `${arrow}${signed(value)}`);
  }

  function badges(node) {
    const list = [];
    if (node.root) return list;
    if (node.returned) list.push(create("span", "badge returned", "★ returned"));
    list.push(create("span", `badge ${node.kept ? "kept" : "dropped"}`, node.kept ? "✓ kept" : "✕ dropped"));
    if (node.count > 1) list.push(create("span", "badge", `×${node.count}`));
    if (node.done) {
      const how = ending(node.outcome);
      list.push(create("span", `badge ${how}`, how === "unknown" ? "ended" : `ended: ${how}`));
    }
    return list;
  }

  function describe(node) {
    if (node.root) return `Task: ${tree.goal || tree.task}`;
    const parts = [`Round ${node.round}`, gist(node.action)];
    if (isNumber(node.promise)) parts.push(`promise ${fixed(node.promise)}`);
    if (isNumber(node.progress)) parts.push(`progress ${signed(node.progress)}`);
    parts.push(node.kept ? "kept" : "dropped");
    if (node.count > 1) parts.push(`proposed ${node.count} times`);
    if (node.returned) parts.push("on the returned path");
    if (node.done) parts.push(`ended, ${ending(node.outcome)}`);
    return parts.join(", ");
  }

  function card(node, level) {
    const element = create("div", "card");
    element.classList.toggle("dropped", !node.kept);
    element.classList.toggle("returned", Boolean(node.returned));
    const siblings = node.root ? [node] : nodes.get(node.parent).children;
    element.classList.toggle("sibling-start", siblings[0] === node);
    element.setAttribute("role", "treeitem");
    element.setAttribute("aria-level", String(level + 1));
    element.setAttribute("aria-setsize", String(siblings.length));
    element.setAttribute("aria-posinset", String(siblings.indexOf(node) + 1));
    if (node.children.length) element.setAttribute("aria-expanded", "true");
    element.setAttribute("aria-label", describe(node));
    element.tabIndex = -1;
    element.dataset.node = String(node.id);
    const top = create("div", "top");
    if (!node.kept) top.append(create("span", "cross", "✕"));
    top.append(create("span", "says", node.root ? tree.goal || gist(tree.prompt) : gist(node.action)));
    if (!node.kept && node.count > 1) top.append(create("span", "badge", `×${node.count}`));
    element.append(top);
    if (!node.root && isNumber(node.promise)) {
      const meter = create("div", "meter");
      const promise = create("span", "promise", fixed(node.promise));
      meter.append(gauge(node.promise, tree.method), promise, change(node.progress));
      element.append(meter);
    }
    if (node.kept) {
      const row = create("div", "badges");
      row.append(...badges(node));
      element.append(row);
    }
    return element;
  }

  function draw() {
    const showDropped = byId("dropped").checked;
    cards = new Map();
    const built = levels().map((level, depth) => {
      const shown = level.filter((node) => showDropped || node.kept);
      const column = create("div", "column");
      column.setAttribute("role", "group");
      const dropped = level.filter((node) => !node.kept).length;
      const kept = `${level.length - dropped} kept of ${level.length}`;
      const head = create("h3", "", depth === 0 ? "Task" : `Round ${level[0].round} · ${kept}`);
      column.setAttribute("aria-label", head.textContent);
      column.append(head);
      for (const node of shown) {
        const element = card(node, depth);
        cards.set(node.id, element);
        column.append(element);
      }
      return column;
    });
    columns.replaceChildren(...built);
    connect();
  }

  function connect() {
    links.replaceChildren();
    links.setAttribute("width", columns.scrollWidth);
    links.setAttribute("height", columns.scrollHeight);
    const origin = columns.getBoundingClientRect();
    for (const kind of ["dropped", "kept", "returned"]) {
      for (const [id, element] of cards) {
        const node = nodes.get(id);
        const from = cards.get(node.parent);
        if (!from || kind !== (node.returned ? "returned" : node.kept ? "kept" : "dropped")) continue;
        const a = from.getBoundingClientRect(), b = element.getBoundingClientRect();
        const x0 = a.right - origin.left, x1 = b.left - origin.left, bend = (x1 - x0) / 2;
        const y0 = a.top + a.height / 2 - origin.top, y1 = b.top + b.height / 2 - origin.top;
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
        path.setAttribute("d", `M${x0} ${y0}C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}`);
        path.setAttribute("class", kind);
        links.append(path);
      }
    }
  }

  function showDetail(node) {
    const parts = [];
    const block = (title, text) => parts.push(create("h3", "", title), create("pre", "", text));
    if (node.root) {
      block("The task, as the policy reads it", tree.prompt || tree.goal || tree.task);
    } else {
      parts.push(create("h3", "", `Round ${node.round}`));
      const row = create("div", "badges");
      row.append(...badges(node));
      parts.push(row);
      const list = create("dl");
      const entry = (term, ...content) => {
        const definition = create("dd");
        definition.append(...content);
        list.append(create("dt", "", term), definition);
      };
      if (isNumber(node.promise)) entry("promise", create("b", "", fixed(node.promise)), gauge(node.promise, tree.method));
      if (isNumber(node.looked)) entry("lookahead", create("b", "", fixed(node.looked)), gauge(node.looked, tree.method));
      if (isNumber(node.progress)) entry("progress", change(node.progress));
      if (node.count > 1) entry("proposed", create("span", "", `${node.count} times, merged`));
      if (node.done) entry("ended", create("span", "", ending(node.outcome)));
      parts.push(list);
      block("Action, in full", node.action);
      if (node.observation !== null) block("The environment answers", node.observation);
      else if (!node.kept) parts.push(create("h3", "", "Dropped: never executed, so nothing answered."));
      parts.push(conversation(node));
    }
    detail.replaceChildren(...parts);
    detail.scrollTop = 0;
  }

  function conversation(node) {
    const path = [];
    for (let each = node; each && !each.root; each = nodes.get(each.parent)) path.unshift(each);
    const box = create("details");
    box.append(create("summary", "", "The whole conversation up to here"));
    box.append(create("h3", "", "Task"), create("pre", "", tree.prompt));
    for (const each of path) {
      box.append(create("h3", "", `Round ${each.round}, promise ${fixed(each.promise)}`), create("pre", "", each.action));
      if (each.observation !== null) box.append(create("h3", "", "Answer"), create("pre", "", each.observation));
    }
    return box;
  }

  function select(id, { focus = true, link = true } = {}) {
    if (!cards.has(id)) id = 0;
    const before = cards.get(selected);
    if (before) { before.setAttribute("aria-selected", "false"); before.tabIndex = -1; }
    selected = id;
    const element = cards.get(id);
    element.setAttribute("aria-selected", "true");
    element.tabIndex = 0;
    if (focus) element.focus({ preventScroll: true });
    reveal(element);
    showDetail(nodes.get(id));
    if (link) history.replaceState(null, "", address());
  }

  /* Scroll the tree's own box only: the page stays where the reader left it. */
  function reveal(element) {
    const box = treeBox.getBoundingClientRect(), at = element.getBoundingClientRect();
    const margin = 48;
    if (at.left < box.left + margin) treeBox.scrollLeft -= box.left + margin - at.left;
    else if (at.right > box.right - margin) treeBox.scrollLeft += at.right - box.right + margin;
    if (at.top < box.top + margin) treeBox.scrollTop -= box.top + margin - at.top;
    else if (at.bottom > box.bottom - margin) treeBox.scrollTop += at.bottom - box.bottom + margin;
  }

  function move(key) {
    const node = nodes.get(selected);
    const column = [...cards.get(selected).parentElement.querySelectorAll(".card")];
    const at = column.indexOf(cards.get(selected));
    const shownChildren = node.children.filter((child) => cards.has(child.id));
    const target = {
      ArrowLeft: () => (node.root ? null : node.parent),
      ArrowRight: () => (shownChildren.find((child) => child.returned) || shownChildren[0] || { id: null }).id,
      ArrowUp: () => (at > 0 ? Number(column[at - 1].dataset.node) : null),
      ArrowDown: () => (at < column.length - 1 ? Number(column[at + 1].dataset.node) : null),
      Home: () => 0,
      End: () => (cards.has(tree.best) ? tree.best : null),
    }[key];
    if (!target) return false;
    const id = target();
    if (id !== null) select(id);
    return true;
  }

  function openDetail() {
    detail.focus({ preventScroll: true });
    detail.scrollIntoView({ block: "nearest" });
  }

  /* Opens on the first action of the returned path, unless a node is asked for. */
  function show(newTree, wantedNode, options = {}) {
    tree = newTree;
    index();
    const start = nodes.get(0).children.find((child) => child.returned);
    const node = nodes.has(wantedNode) ? wantedNode : start ? start.id : 0;
    if (!nodes.get(node).kept) byId("dropped").checked = true;
    fillControls();
    summarise();
    treeBox.scrollTop = treeBox.scrollLeft = 0;
    selected = 0;
    draw();
    select(node, options);
  }

  function fillControls() {
    taskSelect.value = String(tasks.indexOf(tree.task));
    const sameTask = trees.filter((each) => each.task === tree.task);
    const methods = Object.keys(names).filter((label) => sameTask.some((each) => each.method === label));
    methodsBox.replaceChildren(methodsBox.querySelector("legend"), ...methods.map((label) => {
      const box = create("label", "choice");
      const input = create("input");
      Object.assign(input, { type: "radio", name: "method", value: label, checked: label === tree.method });
      const same = sameTask.find((each) => each.method === label && searchKey(each) === searchKey(tree));
      const text = create("span", "", methodName(label));
      if (same) text.append(create("b", "", mark(same.outcome)));
      box.append(input, text);
      input.setAttribute("aria-label", `${methodName(label)}${same ? `, ${ending(same.outcome)}` : ""}`);
      return box;
    }));
    const searches = sameTask.filter((each) => each.method === tree.method);
    searchSelect.replaceChildren(...searches.map((each) => option(String(trees.indexOf(each)), searchKey(each))));
    searchSelect.value = String(trees.indexOf(tree));
    byId("search-field").hidden = searches.length < 2;
  }

  function option(value, text) {
    const element = create("option", "", text);
    element.value = value;
    return element;
  }

  function summarise() {
    const all = [...nodes.values()].filter((node) => !node.root);
    const proposed = all.reduce((sum, node) => sum + node.count, 0);
    const kept = all.filter((node) => node.kept).length;
    const rounds = all.reduce((last, node) => Math.max(last, node.round), 0);
    const text = `${methodName(tree.method)}, ${searchKey(tree)}: ${ending(tree.outcome)}. `
      + `${proposed} actions proposed in ${rounds} rounds, ${all.length} different ones scored, ${kept} kept.`;
    byId("summary").textContent = text;
  }

  /* The address names task, method, search, seed and action: it stays valid if the trees change their order. */
  function address() {
    const parts = [tree.task, tree.method, tree.beam, tree.seed ?? "", selected];
    return `#/${parts.map((part) => encodeURIComponent(part)).join("/")}`;
  }

  function fromAddress() {
    if (!location.hash.startsWith("#/")) return null;
    let parts;
    try { parts = location.hash.slice(2).split("/").map(decodeURIComponent); } catch { return null; }
    const [task, method, beam, seed, node] = parts;
    const target = trees.find((each) => each.task === task && each.method === method && each.beam === beam
      && String(each.seed ?? "") === seed);
    return target ? { tree: target, node: Number(node) } : null;
  }

  function nearest(task, wanted) {
    const sameTask = trees.filter((each) => each.task === task);
    const score = (each) => 2 * Number(each.method === wanted.method) + Number(searchKey(each) === searchKey(wanted));
    return sameTask.reduce((best, each) => (score(each) > score(best) ? each : best));
  }

  /* The page opens on a solved search of several rounds if there is one: it shows the most. */
  function defaultTree() {
    const solved = (each) => each.outcome >= 1 && each.nodes.some((node) => (node.round ?? 1) > 2);
    const worth = (each) => (
      4 * Number(each.method === "agentprm") + 2 * Number(solved(each)) + Number(each.beam === "4x4")
    );
    return trees.reduce((best, each) => (worth(each) > worth(best) ? each : best));
  }

  function step(by) {
    const at = (tasks.indexOf(tree.task) + by + tasks.length) % tasks.length;
    show(nearest(tasks[at], tree), undefined, { focus: false });
  }

  tasks.forEach((task, at) => {
    const sample = trees.find((each) => each.task === task);
    const extra = [sample.goal, isNumber(sample.depth) ? `depth ${sample.depth}` : null].filter(Boolean).join(", ");
    taskSelect.append(option(String(at), extra ? `${extra} (${task})` : task));
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  taskSelect.addEventListener("change", () => {
    show(nearest(tasks[Number(taskSelect.value)], tree), undefined, { focus: false });
  });
  searchSelect.addEventListener("change", () => show(trees[Number(searchSelect.value)], undefined, { focus: false }));
  methodsBox.addEventListener("change", (event) => {
    const wanted = { method: event.target.value, beam: tree.beam, seed: tree.seed };
    show(nearest(tree.task, wanted), undefined, { focus: false });
    methodsBox.querySelector("input:checked").focus();
  });
  byId("dropped").addEventListener("change", () => { draw(); select(selected, { focus: false }); });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  columns.addEventListener("click", (event) => {
    const element = event.target.closest(".card");
    if (!element) return;
    select(Number(element.dataset.node));
    if (matchMedia("(max-width: 52rem)").matches) detail.scrollIntoView({ block: "nearest" });
  });
  columns.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !event.target.closest(".card")) return;
    if (event.key === "Enter" || event.key === " ") openDetail();
    else if (!move(event.key)) return;
    event.preventDefault();
  });
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cards.get(selected).focus({ preventScroll: true });
  });
  addEventListener("hashchange", () => {
    const wanted = fromAddress();
    if (wanted) show(wanted.tree, wanted.node, { link: false });
  });
  new ResizeObserver(connect).observe(columns);

  const wanted = fromAddress();
  if (wanted) {
    show(wanted.tree, wanted.node, { focus: false, link: false });
    byId("viewer").scrollIntoView();
  } else {
    show(defaultTree(), undefined, { focus: false, link: false });
  }
})();
