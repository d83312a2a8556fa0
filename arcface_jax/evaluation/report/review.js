"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const storage = `arcface-jax-review-${data.digest}`;
  const KEYS = { m: "merge", k: "keep", d: "drop", r: "relabel", v: "review" };
  const SHOWN = 12; // labels of a group
  const at = (id) => document.getElementById(id);

  const named = (label) => (label in data.names ? `${data.names[label]} (${label})` : `identity ${label}`);
  const count = (number, noun) => `${number.toLocaleString("en")}${noun ? ` ${noun}${number === 1 ? "" : "s"}` : ""}`;
  const plural = (cell) => count(Number(cell), "image");
  // What the page shows of each file: a finding's cells by column in `c`.
  const KINDS = {
    "duplicates.csv": {
      title: "Duplicate",
      all: "duplicates",
      score: (c) => Number(c.score),
      labels: (c) => [c.label_a, c.label_b],
      facts: (c) => [
        c.mutual === "1" ? "nearest to each other" : "nearest one way only",
        c.same_photo === "1" ? "the same photograph" : "",
      ],
      sides: (c) => [
        [named(c.label_a), plural(c.images_a)],
        [named(c.label_b), plural(c.images_b)],
      ],
      help: {
        merge: "one person, merge the labels",
        drop: "leave out the label with fewer images",
        keep: "two people",
        review: "undecided",
      },
    },
    "mixed.csv": {
      title: "Mixed identity",
      all: "mixed identities",
      score: (c) => Number(c.score),
      labels: (c) => [c.label],
      facts: (c) => [`within a half ${c.within}`, `across ${c.cross}`],
      sides: (c) => [
        [named(c.label), `larger half, ${plural(c.images_a)}`],
        [named(c.label), `smaller half, ${plural(c.images_b)}`],
      ],
      help: { drop: "leave out the identity", keep: "one person", review: "undecided" },
    },
    "images.csv": {
      title: "Wrong label",
      all: "wrong labels",
      score: (c) => Number(c.other) - Number(c.own),
      labels: (c) => [c.given_label, c.suggested_label],
      facts: (c) => [`own identity ${c.own}`, `best other ${c.other}`],
      path: (c) => `image ${c.index}: ${c.path}`,
      sides: (c) => [
        ["this image", ""],
        [named(c.given_label), "its label"],
        [c.suggested_label && named(c.suggested_label), "suggested"],
      ],
      help: {
        drop: "leave out the image",
        relabel: "move it to the suggested identity",
        keep: "the label is right",
        review: "undecided",
      },
    },
  };

  // Findings, their groups, and the decisions made here.
  const findings = [];
  const groups = new Map();
  for (const [file, table] of Object.entries(data.tables)) {
    const kind = KINDS[file];
    table.rows.forEach((row, index) => {
      const c = Object.fromEntries(table.columns.map((column, i) => [column, row[i]]));
      const names = kind.labels(c).filter(Boolean).map(named);
      const pictures = table.pictures[index] ?? [];
      const one = { file, index, c, kind, pictures, place: findings.length, score: kind.score(c) };
      one.id = `${file}:${index}`;
      one.name = names.join(" / ");
      one.text = [...names, c.path ?? ""].join("\n").toLowerCase();
      findings.push(one);
      if (c.group) groups.set(c.group, [...(groups.get(c.group) ?? []), one]);
    });
  }
  for (const pairs of groups.values()) {
    if (pairs.length === 1) continue;
    for (const one of pairs) Object.assign(one, { group: pairs, place: pairs[0].place + 0.5 });
  }
  const changes = load();
  let undone = [];
  let kept = true;

  function load() {
    try {
      return JSON.parse(localStorage.getItem(storage)) ?? {};
    } catch {
      return {};
    }
  }

  function save() {
    try {
      localStorage.setItem(storage, JSON.stringify(changes));
      kept = true;
    } catch {
      kept = false; // forbidden for files in some browsers: the page asks before it is left
    }
  }

  const decisionOf = (one) => changes[one.id] ?? one.c.decision;
  const isPossible = (one, decision) =>
    data.tables[one.file].decisions.includes(decision) &&
    (decision !== "relabel" || one.c.suggested_label !== "");

  function decide(some, decision) {
    undone.push(some.map((one) => [one, decisionOf(one)]));
    for (const one of some) set(one, decision);
    save();
  }

  function set(one, decision) {
    if (decision === one.c.decision) delete changes[one.id];
    else changes[one.id] = decision;
  }

  // The list: what the filters leave, in order. A decision does not take a finding off it.
  let listed = [];
  let page = 0;
  let current = 0;
  const size = () => Number(at("size").value);
  const pages = () => Math.max(1, Math.ceil(listed.length / size()));

  const ORDERS = {
    written: (a, b) => a.place - b.place,
    down: (a, b) => b.score - a.score,
    up: (a, b) => a.score - b.score,
    name: (a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0),
  };

  function filter() {
    const [kind, decision, text] = ["kind", "decision", "text"].map((name) => at(name).value);
    const low = at("low").value === "" ? -Infinity : Number(at("low").value);
    const high = at("high").value === "" ? Infinity : Number(at("high").value);
    const wanted = text.toLowerCase();
    listed = findings.filter(
      (one) =>
        (!kind || one.file === kind) &&
        (!decision || decisionOf(one) === decision) &&
        one.score >= low &&
        one.score <= high &&
        one.text.includes(wanted),
    );
    listed.sort(ORDERS[at("sort").value]);
    [page, current] = [0, 0];
    show();
  }

  // Names and paths become text nodes, never markup.
  function make(tag, properties, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties ?? {})) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== ""));
    return node;
  }

  function side(number, name, note, only) {
    const caption = make("figcaption", null, make("b", null, name), note && `, ${note}`);
    const faces = data.strips[number];
    if (!faces) return make("figure", null, caption, make("span", null, "no picture"));
    const picture = make("img", {
      loading: "lazy",
      decoding: "async",
      width: faces * data.side,
      height: data.side,
      alt: only ? "the image" : `${plural(faces)} of ${name}`,
      src: `${data.folder}/${number}.jpg`,
    });
    return make("figure", only ? { className: "one" } : null, caption, picture);
  }

  function buttons(some, help) {
    const box = make("div", { className: "decide", role: "group", "aria-label": "Decision" });
    for (const decision of data.tables[some[0].file].decisions) {
      const key = Object.keys(KEYS).find((letter) => KEYS[letter] === decision);
      const button = make("button", { type: "button", title: help[decision] }, decision, " ");
      if (some.length === 1) button.append(make("kbd", { "aria-hidden": "true" }, key.toUpperCase()));
      button.dataset.decision = decision;
      button.disabled = !some.every((one) => isPossible(one, decision));
      button.addEventListener("click", () => {
        decide(some, decision);
        refresh();
      });
      box.append(button);
    }
    box.findings = some;
    return box;
  }

  function card(one, number) {
    const { kind, c, pictures } = one;
    const line = make("div", { className: "line" });
    const title = `${kind.title} ${one.score.toFixed(3)}`;
    line.append(make("b", null, title));
    for (const fact of kind.facts(c).filter(Boolean)) line.append(make("span", null, fact));
    line.append(make("span", null, `${count(number + 1)} of ${count(listed.length)}`));
    const sides = make("div", { className: "sides" });
    kind.sides(c).forEach(([name, note], i) => {
      if (name) sides.append(side(pictures[i], name, note, Boolean(kind.path) && i === 0));
    });
    const item = make("li", { className: "finding card", tabIndex: -1 }, line, sides);
    item.setAttribute("aria-label", `${title}: ${one.name}`);
    if (kind.path) item.append(make("p", { className: "path" }, kind.path(c)));
    item.append(buttons([one], kind.help));
    item.addEventListener("focusin", () => select(number));
    item.addEventListener("click", () => select(number));
    return item;
  }

  // More than two labels of one person: all of them side by side, above their pairs.
  function groupCard(pairs) {
    const members = new Map();
    for (const { c, pictures } of pairs) {
      members.set(c.label_a, [pictures[0], plural(c.images_a)]);
      members.set(c.label_b, [pictures[1], plural(c.images_b)]);
    }
    const sides = make("div", { className: "sides" });
    for (const [label, [picture, note]] of [...members].slice(0, SHOWN)) {
      sides.append(side(picture, named(label), note));
    }
    if (members.size > SHOWN) sides.append(`and ${members.size - SHOWN} more`);
    const title = `Group of ${members.size} labels, ${pairs.length} pairs`;
    const line = make("div", { className: "line" }, make("b", null, title), "these buttons decide all of its pairs");
    return make("li", { className: "group card" }, line, sides, buttons(pairs, pairs[0].kind.help));
  }

  function show() {
    const start = page * size();
    const cards = [];
    let before = null;
    listed.slice(start, start + size()).forEach((one, i) => {
      if (one.group && one.group !== before && at("sort").value === "written") {
        cards.push(groupCard(one.group));
      }
      before = one.group;
      cards.push(card(one, start + i));
    });
    const empty = make("li", { className: "empty" }, "No finding matches these filters.");
    at("list").replaceChildren(...(cards.length ? cards : [empty]));
    at("list").start = start + 1;
    refresh();
    mark();
  }

  // Brings buttons and counts up to date after a decision.
  function refresh() {
    for (const box of document.querySelectorAll(".decide")) {
      for (const button of box.children) {
        const pressed = box.findings.every((one) => decisionOf(one) === button.dataset.decision);
        button.setAttribute("aria-pressed", String(pressed));
      }
    }
    const open = findings.reduce((sum, one) => sum + (decisionOf(one) === "review"), 0);
    const changed = Object.keys(changes).length;
    at("status").textContent =
      `page ${count(page + 1)} of ${count(pages())}, ${count(listed.length, "finding")}; ` +
      `${count(changed)} changed here, ${count(open)} to review`;
    for (const name of ["before", "before-too"]) at(name).disabled = page === 0;
    for (const name of ["next", "next-too"]) at(name).disabled = page + 1 >= pages();
    at("discard").disabled = changed === 0;
  }

  const cards = () => [...document.querySelectorAll(".finding")];

  function mark() {
    cards().forEach((item, i) => {
      const here = page * size() + i === current;
      item.classList.toggle("current", here);
      item.tabIndex = here ? 0 : -1;
    });
  }

  function select(number) {
    if (number === current) return;
    current = number;
    mark();
  }

  function go(number) {
    if (!listed.length) return;
    current = Math.min(Math.max(number, 0), listed.length - 1);
    const there = Math.floor(current / size());
    if (there !== page) {
      page = there;
      show();
    }
    mark();
    const item = cards()[current - page * size()];
    item.focus({ preventScroll: true });
    item.scrollIntoView({ block: "nearest" });
  }

  function turn(by) {
    const there = Math.min(Math.max(page + by, 0), pages() - 1);
    if (there !== page) go(there * size());
  }

  function undo() {
    const last = undone.pop();
    if (!last) return;
    for (const [one, decision] of last) set(one, decision);
    save();
    refresh();
    const place = listed.indexOf(last[0][0]);
    if (place >= 0) go(place);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target !== document.body && !event.target.closest("#list")) return;
    const key = event.key.toLowerCase();
    const moves = {
      arrowdown: () => go(current + 1),
      arrowup: () => go(current - 1),
      arrowright: () => turn(1),
      arrowleft: () => turn(-1),
      z: undo,
    };
    const one = listed[current];
    if (key in moves) moves[key]();
    else if (key in KEYS && one && isPossible(one, KEYS[key])) {
      decide([one], KEYS[key]);
      refresh();
      go(current + 1);
    } else return;
    event.preventDefault();
  }

  // As csv.writer of Python quotes, so that an undecided file is saved byte for byte.
  const quoted = (cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);

  function csv(file) {
    const { columns } = data.tables[file];
    const rows = findings
      .filter((one) => one.file === file)
      .map((one) => columns.map((c) => (c === "decision" ? decisionOf(one) : one.c[c])));
    return [columns, ...rows].map((row) => `${row.map(quoted).join(",")}\n`).join("");
  }

  function download(file) {
    const address = URL.createObjectURL(new Blob([csv(file)], { type: "text/csv" }));
    make("a", { href: address, download: file }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  }

  function begin() {
    const decisions = new Set();
    for (const [file, table] of Object.entries(data.tables)) {
      at("kind").append(make("option", { value: file }, KINDS[file].all));
      for (const decision of table.decisions) decisions.add(decision);
      const help = Object.entries(KINDS[file].help).map(([word, text]) => `${word}: ${text}`);
      at("meanings").append(
        make("dt", null, KINDS[file].title),
        make("dd", null, help.join("; ")),
      );
      const button = make("button", { type: "button" }, `Save ${file}`);
      button.addEventListener("click", () => download(file));
      at("files").append(button);
    }
    at("kind").prepend(make("option", { value: "", selected: true }, "all"));
    at("decision").append(make("option", { value: "", selected: true }, "any"));
    for (const decision of decisions) at("decision").append(make("option", { value: decision }, decision));
    for (const name of ["kind", "decision", "low", "high", "text", "sort", "size"]) {
      at(name).addEventListener("input", filter);
    }
    for (const name of ["before", "before-too"]) at(name).addEventListener("click", () => turn(-1));
    for (const name of ["next", "next-too"]) at(name).addEventListener("click", () => turn(1));
    at("discard").addEventListener("click", () => {
      if (!confirm("Discard every decision made on this page?")) return;
      for (const key of Object.keys(changes)) delete changes[key];
      undone = [];
      save();
      show();
    });
    document.addEventListener("keydown", onKey);
    addEventListener("beforeunload", (event) => {
      if (!kept && Object.keys(changes).length) event.preventDefault();
    });
    at("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter") go(0);
    });
    if (matchMedia("(max-width: 720px)").matches) at("filters").open = false;
    filter();
  }

  begin();
})();
