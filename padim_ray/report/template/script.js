"use strict";
(() => {
  const gallery = document.querySelector(".gallery");
  if (!gallery) return;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);
  const cards = all(".card", gallery);
  const filters = all("[data-filter]");
  const sort = one("[data-control=sort]");
  const dialog = one("dialog");
  let current = null; // the card in the large view

  // the heatmap fades to the original below it; cloning it keeps the file small
  for (const card of cards) {
    const thumbnail = card.querySelector(".thumbnail");
    for (const heat of thumbnail ? all(".heat", card) : []) {
      const below = thumbnail.cloneNode();
      below.alt = "";
      below.removeAttribute("class");
      heat.before(below);
    }
    card.choices = card.dataset.choices.split(" ");
    card.text = card.dataset.uri.toLowerCase();
  }

  const shown = () => all(".card:not([hidden])", gallery);

  function choose() {
    for (const card of cards) {
      card.hidden = !filters.every(({ value, dataset: { filter } }) =>
        value === "" ||
        (filter === "name" ? card.text.includes(value.toLowerCase()) : card.choices[filter] === value)
      );
    }
    const count = shown().length;
    one("[data-shown]").value = count === cards.length ? `${count} images` : `${count} of ${cards.length} images`;
    one("[data-none]").hidden = count > 0;
  }

  const orders = {
    rank: (a, b) => a.dataset.rank - b.dataset.rank,
    score: (a, b) => b.dataset.score - a.dataset.score || orders.rank(a, b),
    p: (a, b) => (a.dataset.p || 2) - (b.dataset.p || 2) || orders.rank(a, b),
  };

  const apply = {
    sort: () => gallery.append(...cards.sort(orders[sort.value])),
    heat: (control) => document.body.classList.toggle("no-heat", !control.checked),
    boxes: (control) => document.body.classList.toggle("no-boxes", !control.checked),
    opacity: (control) => document.body.style.setProperty("--heat-opacity", control.value / 100),
  };

  // the toolbar and the large view have the same controls
  document.addEventListener("input", ({ target }) => {
    const name = target.dataset.control;
    if (target.dataset.filter) choose();
    if (!name) return;
    for (const twin of all(`[data-control=${name}]`)) {
      twin.checked = target.checked;
      twin.value = target.value;
    }
    apply[name](target);
  });

  function show(card) {
    current = card;
    const body = one(".large-body");
    const [pair, caption] = [".pair", ".caption"].map((part) => card.querySelector(part).cloneNode(true));
    all("details", caption).forEach((details) => { details.open = true; });
    body.style.setProperty("--r", card.style.getPropertyValue("--r"));
    body.replaceChildren(pair, caption);
    body.scrollTop = 0;
    one("#large-title").textContent = card.dataset.uri;
    const list = shown();
    one("[data-position]").value = `${list.indexOf(card) + 1} of ${list.length}`;
  }

  function step(by) {
    const list = shown();
    show(list[(list.indexOf(current) + by + list.length) % list.length]);
  }

  gallery.addEventListener("click", (event) => {
    const open = event.target.closest(".open");
    if (!open) return;
    show(open.closest(".card"));
    dialog.showModal();
  });
  dialog.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button?.dataset.step) step(Number(button.dataset.step));
    if (target === dialog || (button && "close" in button.dataset)) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const modified = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey;
    if (!by || modified || event.target.type === "range") return;
    event.preventDefault();
    step(by);
  });
  dialog.addEventListener("close", () => {
    const open = current.querySelector(".open");
    open.scrollIntoView({ block: "nearest" });
    open.focus();
  });
  one("[data-clear]").addEventListener("click", () => {
    for (const filter of filters) filter.value = "";
    choose();
    filters[0].focus();
  });
  const toolbar = one(".toolbar");
  toolbar.addEventListener("submit", (event) => event.preventDefault());
  toolbar.hidden = false;

  // browsers may restore the controls' state when the page is reloaded
  for (const control of all("[data-control]", toolbar)) control.dispatchEvent(new Event("input", { bubbles: true }));
  choose();
})();
