// ---- What the page says, in English and Chinese.

const WORDS = {
  en: {
    skip: "Skip to the message box", chats: "Chats", newChat: "New chat", search: "Search chats",
    noChats: "Your chats will be listed here.", settings: "Settings", dark: "Dark colours", light: "Light colours",
    otherLanguage: "中文", openList: "Show the list of chats", closeList: "Hide the list of chats",
    aboutModel: "About the model", conversation: "Conversation", hello: "What is on your mind?",
    toy: "{0} is the built-in toy: it knows a small world and is no assistant. For a real model: qwenrt serve Qwen3-4B",
    talkTo: "{0} answers from this machine. Nothing you write leaves it.", talkToRemote: "{0} answers from {1}.",
    toEnd: "Go to the end", attached: "Attached files", message: "Message", write: "Write a message",
    attach: "Attach text files", thinking: "Thinking", send: "Send", stop: "Stop",
    keys: "Enter sends · Shift+Enter begins a line", context: "{0} of {1} tokens used", undo: "Undo", close: "Close",
    thisChat: "This chat", system: "System prompt", systemHint: "How should the model behave?",
    temperature: "Temperature", maxTokens: "Longest answer (tokens)", seed: "Seed",
    emptyIsOwn: "An empty field is the model's own setting.", yourChats: "Your chats",
    whereKept: "They are kept in this browser, and nowhere else.", export: "Export as a file", import: "Import a file",
    apiKey: "API key", served: "What serves you", keyTitle: "This server needs a key",
    keyMissing: "Whoever runs the server can tell you one.", keyWrong: "The server does not know this key. Try another one.",
    keyKept: "It is kept in this tab until you close it.", useKey: "Use this key", cancel: "Cancel",
    you: "You", assistant: "Answer", copy: "Copy", copied: "Copied", edit: "Edit", again: "Answer again",
    goOn: "Continue", sendEdited: "Send", before: "The version before", after: "The version after",
    version: "Version {0} of {1}", thought: "Thought", thoughtFor: "Thought for {0} s", thinks: "Thinking",
    answerNow: "Answer now", copyCode: "Copy the code",
    reading: "Reading the conversation: {0} of {1} tokens", waiting: "Waiting for its turn",
    figures: "{0} tokens · {1} tokens/s", figuresFirst: "first after {0} s",
    stopped: "Stopped.", cut: "The answer reached its length limit.", late: "The answer took as long as one may take.",
    lost: "The connection was lost, and the server no longer has the rest.",
    gone: "The server does not answer. Trying again in {0} s.",
    stopping: "The server is being stopped. Trying again in {0} s.", tryNow: "Try now",
    busy: "Many are asking at the moment. Trying again in {0} s.", slow: "It waited too long for its turn.",
    tryAgain: "Try again", full: "The conversation has {0} tokens and the model reads {1}.",
    fullAlone: "This message alone is too long for the model: it has {0} tokens, and {1} fit. Shorten it.",
    leaveOut: "Leave out the oldest messages", notSent: "What is above is no longer sent to the model",
    needsKey: "This server needs a key.", enterKey: "Enter the key", problem: "The server says: {0}",
    rename: "Rename", remove: "Delete", removed: "“{0}” is deleted.", untitled: "New chat", name: "Name of the chat",
    exported: "{0} chats are in the file.", imported: "{0} chats and {1} messages are new.",
    notAFile: "{0} is not a file of exported chats.", notText: "{0} is not a text file.",
    tooLarge: "{0} has more than {1} KiB.", removeFile: "Remove {0}", notKept: "This browser lets the page keep nothing: chats are gone when you close it.",
    noRoom: "The browser has no room left: export or delete some chats.", elsewhere: "This chat was deleted in another tab.",
    model: "Model", device: "Device", kernels: "Kernels", dtype: "Numbers", window: "Context", version_: "Version",
    tokens: "{0} tokens", ideas: ["Explain how a rainbow forms", "Write a short poem about the sea", "What should I see in Hangzhou?"],
    toyIdeas: ["What is the capital of France?", "What can you do?", "What colour is the sky?"],
  },
  zh: {
    skip: "跳到输入框", chats: "对话", newChat: "新对话", search: "搜索对话", noChats: "你的对话会列在这里。",
    settings: "设置", dark: "深色", light: "浅色", otherLanguage: "English", openList: "显示对话列表", closeList: "隐藏对话列表",
    aboutModel: "关于模型", conversation: "对话内容", hello: "今天想聊点什么？",
    toy: "{0} 是内置的玩具模型：只认识一个很小的世界，不是助手。换成真正的模型：qwenrt serve Qwen3-4B",
    talkTo: "由本机上的 {0} 回答，你写的内容不会离开这台机器。", talkToRemote: "由 {1} 上的 {0} 回答。",
    toEnd: "回到末尾", attached: "附件", message: "消息", write: "输入消息", attach: "添加文本文件", thinking: "思考", send: "发送",
    stop: "停止", keys: "Enter 发送 · Shift+Enter 换行", context: "已用 {0} / {1} 个 token", undo: "撤销", close: "关闭",
    thisChat: "本次对话", system: "系统提示", systemHint: "希望模型怎样回答？", temperature: "温度",
    maxTokens: "回答上限（token）", seed: "随机种子", emptyIsOwn: "留空即用模型自带的设置。", yourChats: "你的对话",
    whereKept: "只保存在这个浏览器里。", export: "导出为文件", import: "导入文件", apiKey: "API 密钥", served: "由谁回答",
    keyTitle: "这台服务器需要密钥", keyMissing: "请向服务器的管理者索取。", keyWrong: "服务器不认识这个密钥，请换一个。",
    keyKept: "只保存到关闭本标签页为止。", useKey: "使用这个密钥", cancel: "取消", you: "你", assistant: "回答", copy: "复制",
    copied: "已复制", edit: "编辑", again: "重新回答", goOn: "继续", sendEdited: "发送", before: "上一个版本", after: "下一个版本",
    version: "第 {0} 版，共 {1} 版", thought: "思考过程", thoughtFor: "思考了 {0} 秒", thinks: "正在思考", answerNow: "立即回答",
    copyCode: "复制代码", reading: "正在阅读对话：{0} / {1} 个 token", waiting: "正在排队",
    figures: "{0} 个 token · 每秒 {1} 个", figuresFirst: "{0} 秒后开始",
    stopped: "已停止。", cut: "回答达到了长度上限。", late: "回答达到了时间上限。", lost: "连接中断，服务器上已没有其余内容。",
    gone: "服务器没有应答，{0} 秒后重试。", stopping: "服务器正在停止，{0} 秒后重试。",
    tryNow: "立即重试", busy: "现在提问的人很多，{0} 秒后重试。", slow: "排队时间太长，没有轮到。", tryAgain: "重试",
    full: "对话有 {0} 个 token，而模型最多读 {1} 个。", fullAlone: "仅这条消息就有 {0} 个 token，模型最多读 {1} 个，请缩短。",
    leaveOut: "略去最早的消息", notSent: "以上内容不再发送给模型", needsKey: "这台服务器需要密钥。", enterKey: "输入密钥",
    problem: "服务器说：{0}", rename: "重命名", remove: "删除", removed: "已删除“{0}”。", untitled: "新对话", name: "对话名称",
    exported: "文件中有 {0} 个对话。", imported: "新增 {0} 个对话、{1} 条消息。", notAFile: "{0} 不是导出的对话文件。",
    notText: "{0} 不是文本文件。", tooLarge: "{0} 超过 {1} KiB。", removeFile: "移除 {0}",
    notKept: "浏览器不允许本页保存内容：关闭后对话会消失。", noRoom: "浏览器没有空间了：请导出或删除一些对话。",
    elsewhere: "这个对话已在另一个标签页中删除。", model: "模型", device: "设备", kernels: "内核", dtype: "数值类型", window: "上下文",
    version_: "版本", tokens: "{0} 个 token", ideas: ["彩虹是怎样形成的？", "写一首关于大海的短诗", "在杭州值得看什么？"],
    toyIdeas: ["你好", "日本的首都是哪里？", "What can you do?"],
  },
};

let language = localStorage.getItem("language") || (/^zh\b/i.test(navigator.language) ? "zh" : "en");

/** The words of a name, its {0}, {1} filled in. */
function say(name, ...values) {
  return WORDS[language][name].replace(/\{(\d)\}/g, (_, place) => values[place]);
}

const count = number => new Intl.NumberFormat(language).format(number);

/** Puts the words of the language into what the file of the page has. */
function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = say(node.dataset.t);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) {
    const words = say(node.dataset.label);
    node.setAttribute("aria-label", words);
    if (node.matches("button.icon")) node.title = words;
  }
}
