// ---- What the page says, in English and Chinese.

const WORDS = {
	skip: ["Skip to the message box", "跳到输入框"], chats: ["Chats", "对话"], newChat: ["New chat", "新对话"], search: ["Search chats", "搜索对话"],
	noChats: ["Your chats go here.", "你的对话会列在这里。"], settings: ["Settings", "设置"], dark: ["Dark colours", "深色"],
	light: ["Light colours", "浅色"], otherLanguage: ["中文", "English"], openList: ["Show the list of chats", "显示对话列表"],
	closeList: ["Hide the list of chats", "隐藏对话列表"], aboutModel: ["About the model", "关于模型"], conversation: ["Conversation", "对话内容"],
	hello: ["What is on your mind?", "今天想聊点什么？"],
	toy: ["{0} is a built-in toy that knows a small world. For a real model: qwenrt serve Qwen3-4B", "{0} 是内置的玩具模型，只知道很小的世界。要用真正的模型：qwenrt serve Qwen3-4B"],
	talkTo: ["{0} answers from this machine. Nothing you write leaves it.", "由本机上的 {0} 回答，你写的内容不会离开这台机器。"],
	talkToRemote: ["{0} answers from {1}.", "由 {1} 上的 {0} 回答。"], toEnd: ["Go to the end", "回到末尾"], attached: ["Attached files", "附件"],
	message: ["Message", "消息"], write: ["Write a message", "输入消息"], attach: ["Attach text files", "添加文本文件"], thinking: ["Thinking", "思考"],
	send: ["Send", "发送"], stop: ["Stop", "停止"], keys: ["Enter sends · Shift+Enter begins a line", "Enter 发送 · Shift+Enter 换行"],
	context: ["{0} of {1} tokens used", "已用 {0} / {1} 个 token"], undo: ["Undo", "撤销"], close: ["Close", "关闭"], thisChat: ["This chat", "本次对话"],
	system: ["System prompt", "系统提示"], systemHint: ["How should the model behave?", "希望模型怎样回答？"], temperature: ["Temperature", "温度"],
	maxTokens: ["Longest answer (tokens)", "回答上限（token）"], seed: ["Seed", "随机种子"],
	emptyIsOwn: ["Empty fields are the model's own settings.", "留空即用模型自带的设置。"], yourChats: ["Your chats", "你的对话"],
	whereKept: ["They are kept in this browser alone.", "只保存在这个浏览器里。"], export: ["Export as a file", "导出为文件"],
	import: ["Import a file", "导入文件"], apiKey: ["API key", "API 密钥"],
	keyMissing: ["Whoever runs the server can tell you one.", "请向服务器的管理者索取。"],
	keyWrong: ["The server does not know this key.", "服务器不认识这个密钥，请换一个。"],
	keyKept: ["It is kept in this tab until you close it.", "只保存到关闭本标签页为止。"], useKey: ["Use this key", "使用这个密钥"], cancel: ["Cancel", "取消"],
	you: ["You", "你"], assistant: ["Answer", "回答"], copy: ["Copy", "复制"], copied: ["Copied", "已复制"], edit: ["Edit", "编辑"],
	again: ["Answer again", "重新回答"], goOn: ["Continue", "继续"], before: ["The version before", "上一个版本"],
	after: ["The version after", "下一个版本"], version: ["Version {0} of {1}", "第 {0} 版，共 {1} 版"], thought: ["Thought", "思考过程"],
	thoughtFor: ["Thought for {0} s", "思考了 {0} 秒"], answerNow: ["Answer now", "立即回答"],
	copyCode: ["Copy the code", "复制代码"], reading: ["Reading the conversation: {0} of {1} tokens", "正在阅读对话：{0} / {1} 个 token"],
	waiting: ["Waiting for its turn", "正在排队"], figures: ["{0} tokens · {1} tokens/s", "{0} 个 token · 每秒 {1} 个"],
	stopped: ["Stopped.", "已停止。"], cut: ["The answer reached its length limit.", "回答达到了长度上限。"],
	late: ["The answer reached its time limit.", "回答达到了时间上限。"],
	lost: ["The connection was lost, and the rest with it.", "连接中断，其余内容已丢失。"],
	gone: ["The server does not answer. Trying again in {0} s.", "服务器没有应答，{0} 秒后重试。"],
	stopping: ["The server is being stopped. Trying again in {0} s.", "服务器正在停止，{0} 秒后重试。"], tryNow: ["Try now", "立即重试"],
	busy: ["Many are asking. Trying again in {0} s.", "现在提问的人很多，{0} 秒后重试。"], slow: ["It waited too long for its turn.", "排队太久，没有轮到。"],
	tryAgain: ["Try again", "重试"], full: ["The conversation has {0} tokens and the model reads {1}.", "对话有 {0} 个 token，而模型最多读 {1} 个。"],
	fullAlone: ["This message alone has {0} tokens, and the model reads {1}.", "仅这条消息就有 {0} 个 token，模型最多读 {1} 个。"],
	leaveOut: ["Leave out the oldest messages", "略去最早的消息"], notSent: ["What is above is no longer sent to the model", "以上内容不再发送给模型"],
	needsKey: ["This server needs a key.", "这台服务器需要密钥。"], enterKey: ["Enter the key", "输入密钥"], problem: ["The server says: {0}", "服务器说：{0}"],
	rename: ["Rename", "重命名"], remove: ["Delete", "删除"], removed: ["“{0}” is deleted.", "已删除“{0}”。"],
	name: ["Name of the chat", "对话名称"], exported: ["{0} chats are in the file.", "文件中有 {0} 个对话。"],
	imported: ["{0} chats and {1} messages are new.", "新增 {0} 个对话、{1} 条消息。"], notAFile: ["{0} is not a file of exported chats.", "{0} 不是导出的对话文件。"],
	notText: ["{0} is not a text file.", "{0} 不是文本文件。"], tooLarge: ["{0} has more than {1} KiB.", "{0} 超过 {1} KiB。"],
	removeFile: ["Remove {0}", "移除 {0}"],
	notKept: ["This browser keeps nothing for the page, so it cannot work.", "浏览器不允许本页保存内容，因此无法使用。"],
	noRoom: ["The browser is full: export or delete some chats.", "浏览器空间已满：请导出或删除一些对话。"],
	elsewhere: ["This chat was deleted in another tab.", "这个对话已在另一个标签页中删除。"],
	tokens: ["{0} tokens", "{0} 个 token"],
	ideas: [["Explain how a rainbow forms", "Write a short poem about the sea", "What should I see in Hangzhou?"], ["彩虹是怎样形成的？", "写一首关于大海的短诗", "在杭州值得看什么？"]],
	toyIdeas: [["What is the capital of France?", "What can you do?", "What colour is the sky?"], ["你好", "日本的首都是哪里？", "你能做什么？"]],
}

const root = document.documentElement
let language = localStorage.getItem("language") || (/^zh\b/i.test(navigator.language) ? "zh" : "en")

const inLanguage = words => words[language === "zh" ? 1 : 0]

const say = (name, ...values) => inLanguage(WORDS[name]).replace(/\{(\d)\}/g, (_, place) => values[place])

const count = number => number.toLocaleString(language)

// Puts the words of the language into the page.
function translate() {
	root.lang = language === "zh" ? "zh-CN" : "en"
	for (const node of document.querySelectorAll("[data-t]")) node.textContent = say(node.dataset.t)
	for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder)
	for (const node of document.querySelectorAll("[data-label]")) {
		node.ariaLabel = say(node.dataset.label)
		if (node.matches("button.icon")) node.title = node.ariaLabel
	}
}
