(() => {
  "use strict";
  const sets = JSON.parse(document.getElementById("explorer-data").textContent),
    KINDS = ["cold", "rare", "middle", "popular"];
  const at = name => document.getElementById("pick-" + name),
    pick = Object.fromEntries(
      ["set", "model", "other", "target", "user", "items"].map(name => [name, at(name)]),
    );
  const make = (tag, look, text) => {
    const part = document.createElement(tag);
    if (look) part.className = look;
    if (text !== undefined) part.textContent = text;
    return part;
  };
  const put = (part, ...inner) => {
    part.append(...inner.filter(x => x));
    return part;
  };
  const number = x => String(Math.round(x * 100) / 100),
    percent = x => Math.round(100 * x) + "%";
  const fill = (select, pairs, wish) => {
    select.replaceChildren(
      ...pairs.map(([value, text]) => {
        const option = make("option", "", text);
        option.value = value;
        return option;
      }),
    );
    if (pairs.some(([value]) => value === wish)) select.value = wish;
  };
  const here = () => sets[+pick.set.value],
    user = () => here().users[+pick.user.value];
  let views = [],
    turn = 0;

  const bar = (name, share, text) => {
    const fillPart = make("i");
    fillPart.style.width = Math.max(0, Math.min(1, share)) * 100 + "%";
    return put(make("div", "bar"), make("span", "", name), fillPart, make("b", "", text));
  };
  const why = (set, model, place) => {
    const inner = make("div"),
      read = Object.entries(set.attention[model][place.item] || {});
    if (read.length)
      put(
        inner,
        make("p", "", "Attention of the item's queries over its attributes"),
        ...read.slice(0, 6).map(([name, share]) => bar(name, share, percent(share))),
      );
    put(
      inner,
      make("p", "", "Nearest events of the history, cosine by " + set.near[model]),
      ...place.nearest.map(([item, cosine]) => bar(set.items[item].title, cosine, cosine.toFixed(2))),
    );
    return put(make("details", "why"), make("summary", "", "why"), inner);
  };
  const card = (set, item, place, mark, score, more) => {
    const it = set.items[item],
      line = make("li", mark ? "hit" : "");
    let picture = null;
    if (it.picture) {
      picture = make("img", "pic");
      picture.src = it.picture;
      picture.alt = "Picture of " + it.title;
      picture.width = picture.height = 56;
    } else if (set.pictures) picture = make("span", "pic none");
    const what = put(
      make("span", "what"),
      make("span", "", it.title),
      it.kind && make("i", "kind " + it.kind, it.kind),
      it.detail && make("small", "", it.detail),
    );
    return put(
      line,
      make("span", "place", place),
      picture,
      what,
      mark && make("strong", "badge hit", "hit"),
      score === undefined ? null : make("small", "score", number(score)),
      more,
    );
  };
  const list = (title, lines, of) => {
    const box = put(make("div"), make("h4", "", title), put(make("ol", "items"), ...lines));
    if (lines.length < of) box.append(make("p", "soft", lines.length + " of " + of + " shown"));
    return box;
  };

  function showUser() {
    const box = document.getElementById("explorer-user"),
      status = document.getElementById("explorer-status"),
      set = here();
    const index = pick.user.selectedIndex,
      ends = pick.user.options.length - 1;
    document.getElementById("step-back").disabled = index <= 0;
    document.getElementById("step-on").disabled = index < 0 || index >= ends;
    if (index < 0) {
      box.replaceChildren(
        make(
          "p",
          "notice",
          set.allowed === "none"
            ? "Not shown: the licence of this set does not allow passing its rows or pictures on."
            : "No such user among those that are kept.",
        ),
      );
      status.textContent = "";
      return;
    }
    const who = user(),
      models = [...new Set([pick.model.value, pick.other.value].filter(Boolean))],
      kind = pick.items.value,
      fits = item => !kind || set.items[item].kind === kind;
    const ranks = models.map(model =>
      make(
        "span",
        "badge " + (who.rank[model] <= 10 ? "hit" : "plain"),
        model + ": rank " + number(who.rank[model]),
      ),
    );
    const target = put(make("ol", "items target-item"), card(set, who.target, "", false));
    const past = who.history
      .map((item, i) => [item, i])
      .filter(([item]) => fits(item))
      .map(([item, i]) => card(set, item, i + 1, false));
    const tops = models.map(model =>
      list(
        "Top ten of " + model,
        who.top[model]
          .map((place, i) => [place, i])
          .filter(([place]) => fits(place.item))
          .map(([place, i]) =>
            card(set, place.item, i + 1, place.item === who.target, place.score, why(set, model, place)),
          ),
        who.top[model].length,
      ),
    );
    const older =
      who.events > who.history.length ? ", the last " + who.history.length + " of " + who.events : "";
    box.replaceChildren(
      ...(set.allowed === "text"
        ? [
            make(
              "p",
              "notice",
              "Shown on this machine only: the licence of this set does not allow passing it on.",
            ),
          ]
        : []),
      put(make("div", "row"), make("h3", "", "User " + who.user), ...ranks),
      make("p", "soft", "Chosen next:"),
      target,
      put(
        make("div", "three"),
        list("History, most recent first" + older, past, who.history.length),
        ...tops,
      ),
    );
    status.textContent = index + 1 + " of " + (ends + 1) + " users";
  }

  function fillUsers(wish) {
    const set = here(),
      model = pick.model.value,
      kept = set.users
        .map((who, i) => [who, i])
        .filter(([who]) => !pick.target.value || set.items[who.target].kind === pick.target.value);
    fill(
      pick.user,
      kept.map(([who, i]) => [String(i), who.user + (model ? ", rank " + number(who.rank[model]) : "")]),
      wish,
    );
    showUser();
  }

  function pickInCharts() {
    views.forEach(view => view.signal("picked", pick.model.value).runAsync());
  }

  async function showCharts() {
    const box = document.getElementById("explorer-charts"),
      mine = ++turn,
      set = here(),
      style = getComputedStyle(document.documentElement),
      tone = name => style.getPropertyValue(name).trim();
    views.forEach(view => view.finalize());
    views = [];
    box.replaceChildren();
    const text = {
        labelColor: tone("--ink"),
        titleColor: tone("--ink"),
        labelFontSize: 12,
        titleFontSize: 12,
      },
      rule = { gridColor: tone("--line"), domainColor: tone("--line"), tickColor: tone("--line") };
    const config = {
      background: null,
      font: "system-ui, sans-serif",
      axis: { ...text, ...rule, labelLimit: 140 },
      legend: { ...text, symbolStrokeWidth: 3 },
      view: { stroke: null },
    };
    const stages = set.charts.map(() => make("div")); // all boxes stand before the first is drawn: a drawing is as wide as its box is then
    box.append(
      ...set.charts.map((chart, i) =>
        put(
          make("div"),
          make("h3", "", chart.title),
          put(make("figure"), stages[i], make("figcaption", "", chart.caption)),
        ),
      ),
    );
    for (const [i, chart] of set.charts.entries()) {
      const stage = stages[i];
      const made = await vegaEmbed(stage, chart.spec, { ast: true, actions: false, renderer: "svg", config });
      if (mine !== turn) {
        made.view.finalize();
        return;
      }
      const drawing = stage.querySelector("svg");
      drawing.setAttribute("role", "img");
      drawing.setAttribute("aria-label", chart.title + ". " + chart.words);
      views.push(made.view);
    }
    pickInCharts();
    box.dataset.ready = pick.set.value;
  }

  function showSet() {
    const set = here(),
      best = set.models.find(name => name !== "unirec" && !name.startsWith("unirec")) || "";
    fill(
      pick.model,
      set.models.map(name => [name, name]),
      pick.model.value || "unirec",
    );
    fill(pick.other, [["", "nothing"], ...set.models.map(name => [name, name])], pick.other.value || best);
    const count = kind => set.users.filter(who => !kind || set.items[who.target].kind === kind).length;
    fill(
      pick.target,
      [["", "any item (" + count("") + ")"], ...KINDS.map(kind => [kind, kind + " (" + count(kind) + ")"])],
      pick.target.value,
    );
    fill(
      pick.items,
      [["", "all items"], ...KINDS.map(kind => [kind, kind + " items only"])],
      pick.items.value,
    );
    fillUsers();
    showCharts();
  }

  const step = by => {
    const to = pick.user.selectedIndex + by;
    if (to >= 0 && to < pick.user.options.length) {
      pick.user.selectedIndex = to;
      showUser();
    }
  };
  fill(
    pick.set,
    sets.map((set, i) => [String(i), set.name]),
  );
  pick.set.addEventListener("change", showSet);
  pick.model.addEventListener("change", () => {
    fillUsers(pick.user.value);
    pickInCharts();
  });
  pick.target.addEventListener("change", () => fillUsers(pick.user.value));
  for (const name of ["other", "user", "items"]) pick[name].addEventListener("change", showUser);
  document.getElementById("step-back").addEventListener("click", () => step(-1));
  document.getElementById("step-on").addEventListener("click", () => step(1));
  document.getElementById("explorer-form").addEventListener("submit", event => event.preventDefault());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showCharts);
  document.getElementById("explorer-silent").remove();
  document.getElementById("explorer-form").hidden = false;
  showSet();
})();
